"""What the rest of the package stands on, and no flow is in: errors, files, settings, and what is known of torch.

Read backend.py first: it finds the compiled extension. No other part of the package is imported here.
"""
