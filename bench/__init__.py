"""Benchmarks: ratios measured in one run, never timed tests.

Each benchmark is a module with ``main(argv) -> exit code``, run from the source tree by ``python -m bench.NAME`` or
``pyglow-fast bench NAME``:

    kernels     the ops, and the flow step outside its net, against the reference and the peers
    op_memory   what each op allocates beyond its outputs
    gpu_check   build, tests, sanitizer and benchmarks on a GPU machine, one JSON
"""
