"""The foundation, without any flow in it: errors, files, settings, and what is known of torch.

Read backend.py first: it finds the compiled extension. The folder imports no other one.
"""
