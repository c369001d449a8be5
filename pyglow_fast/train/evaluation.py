"""Bits per dimension of a model, image by image and over a set of images with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.moments import Moments
from pyglow_fast.data import Images, UnreadableImageError, batches
from pyglow_fast.likelihood import bits_per_dim
from pyglow_fast.models import Glow
from pyglow_fast.models.class_head import class_bits
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.seeds import derive, noisy, random_subset

GAP = 0.1  # bits/dim between training and held-out images, or to the best of a run, that are worth a word


@dataclass(frozen=True)
class Score:
    """The mean bits/dim of ``images`` images, and the standard error of that mean over the images.

    ``unreadable`` more images could not be read and are left out. ``class_bits`` are the mean of -log2 p(label | top
    latent) and ``accuracy`` the share of images whose likeliest class is right, where the model has a classifier.

    Examples:
        >>> import torch
        >>> from pyglow_fast.train import Score
        >>> score = Score.of(torch.tensor([3.0, 3.2, 3.4, 3.2], dtype=torch.float64))
        >>> f"{score.mean:.2f} ± {score.error_text} bits/dim of {score.images} images"
        '3.20 ± 0.082 bits/dim of 4 images'
    """

    mean: float
    standard_error: float
    images: int
    unreadable: int = 0
    class_bits: float | None = None
    accuracy: float | None = None

    @classmethod
    def of(cls, values: Tensor, unreadable: int = 0, ranks: Ranks | None = None) -> Score:
        """mean = sum b_i / n, standard error = sqrt(sum (b_i - mean)^2 / (n - 1) / n), over all ranks."""
        found = Moments.of(values, (ranks or Ranks()).total)
        return cls(found.mean if found.n else 0.0, found.standard_error, found.n, unreadable)

    @property
    def error_text(self) -> str:
        """The standard error as text for people; "n/a" where there is none, as for one image."""
        return "n/a" if math.isnan(self.standard_error) else f"{self.standard_error:.3f}"


@dataclass(frozen=True)
class ImageScores:
    """The bits/dim of single images, -log2 p(x) / D + log2(n_bins), each with dequantisation noise of its own."""

    indices: Tensor  # int64 (n,), which images these are
    bits_per_dim: Tensor  # float64 (n,); not finite where the model gives the image no likelihood
    unreadable: tuple[int, ...] = ()  # indices of images that could not be read
    classes: Tensor | None = None  # float64 (n, 2) by a classifier: -log2 p(label | top latent), and 1 if it is right


def device_of(model: Glow) -> torch.device:
    """The device of the model."""
    return model._parameter().device


def labels_for(model: Glow, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Put labels on the model's device, which a model with classes must have; None for a model without classes."""
    if model.config.n_classes is None:
        return None
    expect(labels is not None, "data", "images with labels, since the model has classes", "none")
    assert labels is not None
    return labels.to(device_of(model))


def check_fits(model: Glow, data: Images, n_bins: int, labelled: bool = True) -> None:
    """Refuse images that are not of the model's shape or number of grey levels, or if ``labelled`` of its classes."""
    shape, classes, trained = tuple(model.config.image_shape), model.config.n_classes, "as the model was trained on"
    expect(data.image_shape == shape, "data", f"images of shape {shape}, {trained}", data.image_shape)
    expect(data.n_bins == n_bins, "data", f"n_bins {n_bins}, {trained}", data.n_bins)
    found = len(data.class_names)
    expect(not labelled or classes in (None, found), "data", f"{classes} classes, {trained}", found)


@torch.no_grad()
def score_images(
    model: Glow,
    data: Images,
    batch_size: int,
    seed: int,
    limit: int | None = None,
    workers: int = 0,
    on_unreadable: str = "raise",
    ranks: Ranks | None = None,
    progress: Callable[[int], object] | None = None,
    over_classes: bool = False,
) -> ImageScores:
    """Measure the bits/dim of each image, with dequantisation noise of its own that is the same at every call.

    It bounds -log2 P(level) / D from above in expectation (Theis et al. 2016, "A note on the evaluation of generative
    models").

    Args:
        model: the model, which is put in evaluation mode for the call.
        data: the images, of the model's shape.
        batch_size: images at a time.
        seed: decides the noise, and which images are looked at.
        limit: most images to look at, drawn at random since the first ones may all be of one class; None: all.
        workers, on_unreadable: see :func:`pyglow_fast.data.batches`.
        ranks: share the images among these; every rank gets its own part.
        progress: told after each batch how many images it had, as ``progress_line(...).update`` is.
        over_classes: p(x) of a model with classes is the mean of p(x | y) over these, not that of an image's own label,
            as it is anyway for images without labels of its classes.
    """
    n_classes = model.config.n_classes
    over_classes = n_classes is not None and (over_classes or len(data.class_names) != n_classes)
    check_fits(model, data, data.n_bins, labelled=not over_classes)
    chosen = (ranks or Ranks()).share(random_subset(seed, len(data), len(data) if limit is None else limit))
    plan = [[(index, None) for index in part.tolist()] for part in chosen.split(batch_size) if len(part)]
    judged = model.head is not None and data.labels is not None and len(data.class_names) == model.config.classify
    judged = judged and not over_classes
    bits, classes = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, 2, dtype=torch.float64)]
    found, was_training, device = [torch.zeros(0, dtype=torch.int64)], model.training, device_of(model)
    model.eval()
    try:
        for batch, wanted in zip(batches(data, plan, workers, on_unreadable), plan, strict=True):
            labels = None if over_classes else labels_for(model, batch.labels)
            # Others stand in for unreadable ones.
            own = batch.indices == torch.tensor([index for index, _ in wanted])
            keys = torch.tensor([derive(seed, "noise", index) for index, _ in wanted], device=device)
            x = noisy(batch.pixels.to(device), keys, data.n_bins)
            if over_classes:
                log_prob = model.class_log_probs(x).logsumexp(1) - math.log(n_classes or 1)
            elif judged:
                log_prob, logits = model.log_prob_and_logits(x, labels)
                target = batch.labels.to(logits.device)  # type: ignore[union-attr]
                right = (logits.argmax(1) == target).double()
                classes.append(torch.stack([class_bits(logits.double(), target), right], 1).cpu()[own])
            else:
                log_prob = model.log_prob(x, labels)
            bits.append(bits_per_dim(log_prob, model.config.n_values, data.n_bins).double().cpu()[own])
            found.append(batch.indices[own])
            if progress is not None:
                progress(len(wanted))
    finally:
        model.train(was_training)
    indices = torch.cat(found)
    unreadable = tuple(sorted(set(chosen.tolist()) - set(indices.tolist())))
    return ImageScores(indices, torch.cat(bits), unreadable, torch.cat(classes) if judged else None)


def gap_words(held_out: Score, train: Score, step: int, best: float | None, best_step: int) -> str:
    """Say what the scores at the end of a run mean: whether it overfits, and what to try.

    ``best`` is the lowest held-out bits/dim of the run's evaluations, None without any, and ``best_step`` where it was.
    """
    gap = held_out.mean - train.mean
    remedies = "more images, --flip, --optimizer adamw --weight-decay 0.1, or a smaller --hidden or --n-steps"
    if best is not None and best_step < step and held_out.mean - best > GAP:
        return (
            f"overfitting: held-out was best at step {best_step}, {best:.3f} bits/dim, and is {held_out.mean:.3f} now, "
            "as the model learns its training images by heart; other commands take the best checkpoint. Try "
            f"--max-steps {best_step}, over which the rate falls to 0, {remedies}"
        )
    if gap > max(GAP, 3 * held_out.standard_error):  # which is NaN of one image: then GAP
        return (
            f"held-out images cost {gap:.3f} bits/dim more than training images: the model has begun to learn those by "
            f"heart, or the held-out ones are of another kind. Try {remedies}"
        )
    return "held-out images cost about what training images do: no overfitting. More steps, K or width get further"


def evaluate(model: Glow, data: Images, batch_size: int, seed: int, limit: int | None = None, **options: Any) -> Score:
    """Average what :func:`score_images` gives, which explains the arguments; over all ranks, on every one of them."""
    ranks = options.get("ranks") or Ranks()
    scores = score_images(model, data, batch_size, seed, limit, **options)
    (unreadable,) = ranks.total(len(scores.unreadable))
    score = Score.of(scores.bits_per_dim, int(unreadable), ranks)
    if not score.images:
        raise UnreadableImageError(f"data: expected a readable image in {data.name}, found none of {unreadable:g}")
    if scores.classes is None:
        return score
    cost, right = ranks.total(*scores.classes.sum(0).tolist())
    return replace(score, class_bits=cost / score.images, accuracy=right / score.images)
