"""Serves a page in the browser to look at trained runs and to change their images, made with Gradio."""

from pyglow_fast.web.html import CSS
from pyglow_fast.web.page import page
from pyglow_fast.web.server import check_certificate, check_host, credentials, serve
from pyglow_fast.web.shelf import Shelf

__all__ = ["CSS", "Shelf", "check_certificate", "check_host", "credentials", "page", "serve"]
