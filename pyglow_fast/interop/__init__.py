"""Runs models of other libraries faster and in less memory: live models, checkpoints.

- :func:`accelerate` makes the layers of a live model ours, in place; each library that it knows is a table.
- ``pyglow_fast.interop.convert`` reads and writes the checkpoints of other Glows.

Read accelerate.py first, then nflows.py, a table. The folder may import models, and what models may import.
"""

from pyglow_fast.interop.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
