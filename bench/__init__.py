"""Benchmarks: ratios measured in one run, never timed tests.

Each benchmark is a module with ``main(argv) -> exit code``, run from the source tree by ``python -m bench.NAME`` or
``pyglow-fast bench NAME``:

    kernels     the ops, and the flow step outside its net, against the reference and the peers
    models      training step, log_prob and sampling of whole models, against the peers
    calls       what a call costs besides its kernel, and the Python of a flow step
    nets        coupling nets that people have alone, against the library's convolutions
    live        flows of projects that people run, before and after accelerate
    op_memory   what each op allocates beyond its outputs
    memory      training memory against depth and resolution; gradients against float64
    memory_training  Fashion-MNIST, stored against reversible
    scaling     formulas of a step's arithmetic, memory and communication against those rows; processes against threads
    gpu_check   all that needs a GPU in ten minutes: build, tests, sanitizer, benchmarks; its stages' own programs are
                gpu_smoke, gpu_kernels and gpu_steps
"""
