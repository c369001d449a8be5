"""Benchmarks: ratios measured in one run, never timed tests. docs/speed.md lists what ``python -m bench.NAME`` runs."""
