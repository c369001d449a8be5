"""Flow steps of chaiyujin's glow-pytorch and of what derives from it (SRFlow, LLFlow), wherever they are, made ours.

These classes are in no package that an index has: every project has a copy. They are known by their attributes (an
actnorm with ``bias``, ``logs`` and ``inited``; ``invconv``, ``shuffle`` or ``reverse``; ``f`` or ``affine``), and taken
if they compute what we compute: outputs, log-det and gradients of a copy with random weights, in float64, to 1e-9. A
step that looks like one but does not is left, with the reason. ``f`` and ``affine`` may be absent ("noCoupling").

The call stays ``step(input, logdet=None, reverse=False)``, with ``rrdbResults`` where there was one. Their own forward
runs while an actnorm waits for its first batch, with hooks inside the step, under autocast, torch.compile or
torch.func, for inputs of an unexpected type, and where it is as fast: with nets of about as many channels on both sides
of a 3x3 convolution (SRFlow's 320 to 64), and for few positions.

Their loops ask for the class of each layer (``isinstance(layer, FlowStep)``), so steps are not joined in chains. With
``accelerate(model, memory=...)`` each keeps its input and output for the backward, and nothing of its nets.
"""

from pyglow_fast.interop.chaiyujin.step import adopt, finds, left, recompute, release

__all__ = ["adopt", "finds", "left", "recompute", "release"]
