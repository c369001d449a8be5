"""Serves a page in the browser to look at trained runs and to change their images, made with Gradio.

Read page.py first. The folder may import studio, and every folder outside app.
"""

import inspect
from unittest.mock import patch

# Gradio reads the source of the file of each component to write a .pyi beside it, also of ours: a third of the time
# that its import takes. It does not where there is no file.
with patch.object(inspect, "getfile", side_effect=OSError):
    from pyglow_fast.app.web.page import page
    from pyglow_fast.app.web.server import VARIABLE, Place, credentials, serve
    from pyglow_fast.app.web.visitors import Shelf

__all__ = ["VARIABLE", "Place", "Shelf", "credentials", "page", "serve"]
