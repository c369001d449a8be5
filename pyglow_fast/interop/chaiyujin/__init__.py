"""Serves flow steps of chaiyujin's glow-pytorch and of what derives from it (SRFlow, LLFlow), wherever they are.

These classes are in no package of an index: every project has a copy. They are recognised by their attributes (an
actnorm with ``bias``, ``logs`` and ``inited``; ``invconv``, ``shuffle`` or ``reverse``; ``f`` or ``affine``), and
adopted if they compute what this package does: outputs, log-det and gradients of a copy with random weights, in
float64, to 1e-9. A step that looks like one but computes something else is left, with the reason. ``f`` and ``affine``
may be absent ("noCoupling").

The call stays ``step(input, logdet=None, reverse=False)``, with ``rrdbResults`` where there was one. The step's own
forward runs while an actnorm waits for its first batch, with hooks inside the step, under autocast, torch.compile or
torch.func, for inputs of an unexpected type, and where it is as fast: with nets of about as many channels on both sides
of a 3x3 convolution (SRFlow's 320 to 64), and for few positions.

The models loop over their steps and ask for the class of each (``isinstance(layer, FlowStep)``), so steps are not
joined in chains. With ``accelerate(model, memory=...)`` each step keeps its input and output for the backward, and
nothing of its nets.
"""

from pyglow_fast.interop.chaiyujin.step import adopt, finds, left, recompute, release

__all__ = ["adopt", "finds", "left", "recompute", "release"]
