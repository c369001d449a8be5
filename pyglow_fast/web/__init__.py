"""Serves a page in the browser to look at trained runs and to change their images, made with Gradio."""

from pyglow_fast.web.desk import Shelf
from pyglow_fast.web.page import page
from pyglow_fast.web.server import VARIABLE, Place, credentials, serve

__all__ = ["VARIABLE", "Place", "Shelf", "credentials", "page", "serve"]
