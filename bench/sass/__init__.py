"""Executes compiled kernels on the CPU to count what they do: see :mod:`bench.sass.machine`."""
