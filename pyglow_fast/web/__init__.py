"""Serves a page in the browser to look at trained runs and to change their images, made with Gradio."""

from pyglow_fast.web.desk import Shelf
from pyglow_fast.web.page import page
from pyglow_fast.web.parts import CSS
from pyglow_fast.web.server import Place, credentials, serve

__all__ = ["CSS", "Place", "Shelf", "credentials", "page", "serve"]
