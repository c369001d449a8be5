"""Benchmarks: ratios measured in one run, never timed tests. Run from the source tree: ``python -m bench.kernels``."""
