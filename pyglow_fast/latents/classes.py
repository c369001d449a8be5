"""The class that a model with classes finds in an image."""

from __future__ import annotations

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.models import Glow


@torch.no_grad()
def likeliest_class(model: Glow, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """argmax_y log p(x | y), int64 (N,): the class under which each image is likeliest, all equally common.

    One pass encodes x: of log p(x | y) the prior of the top latent alone depends on y. A classifier that was trained
    beside the flow (:meth:`Glow.class_logits`) is not asked.

    Args:
        model: a Glow with classes (n_classes).
        x: images (N, C, *spatial), in about [-0.5, 0.5].
        cond: condition, if the model has one.

    Raises:
        ValueError: a model without classes, or images that do not fit it or whose top latent has no finite density
            under any class.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    n_classes = model.config.n_classes
    expect(n_classes is not None, "model", "one with classes (n_classes)", "n_classes=None")
    assert n_classes is not None  # for the type checker: refused above
    top = model.encode(x, cond)[-1]
    scores = top.new_zeros(len(top), n_classes, dtype=torch.float64)
    for label in range(n_classes):
        mean, log_sd = model.prior(top, torch.full((len(top),), label, device=top.device))
        # Doubles: classes may differ by less than a sum over many values is rounded by.
        scores[:, label] = functional.gaussian_log_prob(top.double(), mean.double(), log_sd.double())
    decided = ~scores.isnan().any(1) & scores.amax(1).isfinite()
    expect(bool(decided.all()), "x", "images with a finite log-likelihood", f"{int((~decided).sum())} without one")
    return scores.argmax(1)
