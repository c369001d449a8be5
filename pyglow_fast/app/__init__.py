"""The program: its commands, the page in the browser, and what both are made of.

Read cli/app.py first. It may import every other folder; studio serves the other three, and nothing imports cli and web.
"""
