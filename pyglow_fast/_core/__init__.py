"""What the rest of the package stands on, and no flow is in: errors, files, settings, and what is known of torch.

Read backend.py first: it finds the compiled extension. The folder imports no other one.
"""
