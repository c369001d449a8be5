"""Serves Jet's couplings of tokens around a ViT: y2 = (u2 + shift) m sigmoid(raw), with u a permutation of x.

The couplings are recognised by their structure, in whatever package they are: those of jet-pytorch (called with the
projections) and of JetFormer's flow (called with images, projections of their own). A class's forward, inverse and
log-det are compared with this package's in float64 before any of its layers is replaced; a layer that differs is left,
with the reason. The nets are called as before.

Two things change: the fixed projections, products with one-hot matrices, become gathers; and shift, scale, log-det and
their gradients are one kernel. Under torch.compile and torch.func, in other dtypes than float32 and float64, with a
context, and where a projection is no permutation, the class's own code runs. Under autocast the state stays in its
dtype.

Reference: Kolesnikov et al. 2024, Jet: a modern transformer-based normalizing flow.
"""

from __future__ import annotations

from pyglow_fast.interop.jet.couplings import adopt, finds, left, release

__all__ = ["adopt", "finds", "left", "release"]
