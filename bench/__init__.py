"""Benchmarks: ratios measured in one run, never timed tests.

Each is run from the source tree by ``python -m bench.NAME``:

    kernels     the ops, and the flow step outside its net, against the reference and a copy
    models      training step, log_prob and sampling of whole models, against the peers
    calls       what a call costs besides its kernel; a flow step where kernels are tiny
    nets        coupling nets that people have alone, against the library's convolutions
    memory      training memory against depth and resolution; time against a budget of bytes
    live        flows of projects that people run, before and after accelerate
    gpu_check   all that needs a GPU, in ten minutes
    tables      the tables of README and docs, of the results that are kept
"""
