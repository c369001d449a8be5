"""A Python that has torch, numpy, safetensors and pytest, and of the other libraries here none."""

from __future__ import annotations

import os
from pathlib import Path

# What the package can do without, and what pytest would load by itself.
HIDDEN = [
    *("normflows", "nflows", "FrEIA", "zuko", "memcnn", "matplotlib", "PIL", "torchvision", "sklearn", "scipy", "tqdm"),
    *("rich", "lightning", "pytorch_lightning", "tensorboard", "lmdb", "yaml", "tomli_w", "hypothesis", "mkdocs"),
    *("mkdocstrings", "pymdownx", "xdist", "execnet", "pytest_benchmark", "onnx", "jet_pytorch", "anomalib", "TTS"),
    "pandas",
]
# Python imports a module of this name as it starts. What is hidden is not found, as where it is not installed.
SITECUSTOMIZE = f"""
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {HIDDEN!r}
        return None if hidden else self._finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def bare_environment(folder: Path) -> dict[str, str]:
    """The environment of such a Python, and of those that it starts; ``folder`` takes a file for it."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return known | {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
