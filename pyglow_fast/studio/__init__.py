"""A trained run to look at: its model, its images, edits, and the command line that repeats each picture."""
