"""Models of other libraries, faster and in less memory: layers to swap in, live models to speed up, checkpoints.


Adapters are imported by the name of the library that they stand in for, which must be installed:
``pyglow_fast.interop.normflows``, ``.nflows`` and ``.freia``.
"""
