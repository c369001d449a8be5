"""Runs models of other libraries faster and in less memory: layers to swap in, live models, checkpoints.

- :func:`accelerate` makes the layers of a live model ours, in place.
- Adapters are imported by the name of the library that they stand in for, which must be installed:
  ``pyglow_fast.interop.normflows``, ``.nflows`` and ``.freia``. Those of ``.chaiyujin``, ``.glow_tts`` and ``.jet``,
  which know classes by their structure, are for ``accelerate`` alone.
- ``pyglow_fast.interop.export`` prepares a model for ONNX, OpenVINO or AOTInductor.
- ``pyglow_fast.interop.convert`` reads and writes the checkpoints of other Glows.
"""

from pyglow_fast.interop.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
