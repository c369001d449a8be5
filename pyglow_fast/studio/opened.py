"""Opens a checkpoint of a run to look at: its frozen model, its images, and what was measured of both."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.data import Images, ImageSet, MissingExtraError, UnreadableImageError
from pyglow_fast.data.single import read_single
from pyglow_fast.latents import likeliest_class
from pyglow_fast.models import Glow
from pyglow_fast.studio.directions import Directions, from_tensors, measure
from pyglow_fast.studio.groups import groups_of
from pyglow_fast.studio.kept import kept, progress_of
from pyglow_fast.studio.reading import middles
from pyglow_fast.studio.samples import check_label
from pyglow_fast.studio.selection import own_images
from pyglow_fast.studio.words import File, HeldOut, Image, Sample, one_line
from pyglow_fast.train import Checkpoint, RunFolder, check_fits, load_model, resolve_device, score_images

TRAIN_IMAGES = 5000  # most training images that directions are measured on
SCORED = 1000  # images of each side that bits/dim are compared with
Progress = Callable[[int, int], None]  # (done, of how many)
LOOK = 0.25  # seconds from one look at another thread's measurement to the next


class Picked(NamedTuple):
    """An image that was chosen: its pixels, uint8 (C, H, W), its label (for a model with classes), and its name.

    Examples:
        >>> import torch
        >>> from pyglow_fast.studio import File, Picked
        >>> picked = Picked(torch.zeros(1, 8, 8, dtype=torch.uint8), label=None, image=File("black.png"))
        >>> picked.image.text, picked.pixels.shape
        ('black.png', torch.Size([1, 8, 8]))
    """

    pixels: Tensor
    label: int | None
    image: Image


class Scores(NamedTuple):
    """The finite bits/dim of some held-out and some training images of a run, float64.

    Examples:
        >>> import torch
        >>> from pyglow_fast.studio import Scores
        >>> scores = Scores(held_out=torch.tensor([3.1, 3.4]), train=torch.tensor([3.0, 3.2, 3.3, 3.6]))
        >>> scores.share_below(3.25)  # half of the training images are likelier than an image of 3.25 bits/dim
        0.5
    """

    held_out: Tensor
    train: Tensor

    def share_below(self, bits: float) -> float:
        """The share of the training images with fewer bits/dim; NaN without any."""
        return float((self.train < bits).double().mean()) if len(self.train) else float("nan")


class LostImagesError(ValueError):
    """Raised when the images that a run was trained on are no longer there, or have changed."""


class AbandonedError(Exception):
    """Raised by a function that is told of the progress of a measurement, to end it: its result is of no use any more.

    It goes on nevertheless where another thread waits for the same.
    """


class OwnImages:
    """The images of a run, loaded when they are first asked for; all checkpoints of the run share them.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.data import load_digits
        >>> from pyglow_fast.studio import OwnImages
        >>> from pyglow_fast.train import TrainConfig, TrainState
        >>> config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4))
        >>> own = OwnImages(TrainState(config, load_digits()).checkpoint())
        >>> data, train, held_out = own.find()
        >>> data.name, len(train), len(held_out), own.missing
        ('digits', 1617, 180, '')
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()

    @functools.cached_property
    def _found(self) -> tuple[Images, Tensor, Tensor] | str:
        try:
            return own_images(self._checkpoint)
        except (ValueError, OSError, MissingExtraError) as error:
            return str(error)

    def belong_to(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint was trained on these images and this split: a run may have been replaced by another."""
        first = self._checkpoint
        same_split = (first.config.data, first.config.seed) == (checkpoint.config.data, checkpoint.config.seed)
        return same_split and first.data == checkpoint.data

    def find(self) -> tuple[Images, Tensor, Tensor]:
        """Load (all images, indices of the training images, indices of the held-out ones).

        Raises:
            LostImagesError: they are no longer there, or have changed.
        """
        with self._lock:
            found = self._found
        if isinstance(found, str):
            raise LostImagesError(found)
        return found

    def look_again(self) -> None:
        """Forget that the images could not be had: they may be back."""
        with self._lock:
            if isinstance(self.__dict__.get("_found"), str):
                del self._found

    @property
    def missing(self) -> str:
        """Say why the images cannot be had; empty if they can."""
        with self._lock:
            return self._found if isinstance(self._found, str) else ""


@dataclass(eq=False)
class OpenRun:
    """One checkpoint of a run, opened to look at and to make pictures with.

    Args:
        name: the run's folder, as it was given.
        best: whether the checkpoint is that with the best held-out bits/dim.
        folder: the folder of the run.
        checkpoint: what the checkpoint holds besides the weights.
        model: the model, frozen.
        images: the images of the run.
        train_images: how many training images directions are measured on, at most.
        device: the device as it was asked for; another one draws other samples.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.studio import OpenRun, parse_image
        >>> from pyglow_fast.train import TrainConfig, start
        >>> model = GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4)
        >>> result = start(TrainConfig(model=model, max_steps=1), "runs/tiny").execute(quiet=True)
        >>> opened = OpenRun.open("runs/tiny")
        >>> picked = opened.pick(parse_image("0"))  # held-out image 0
        >>> opened.step, picked.pixels.shape, opened.bits(picked.pixels) > 0
        (1, torch.Size([1, 8, 8]), True)
    """

    name: str
    best: bool
    folder: RunFolder
    checkpoint: Checkpoint
    model: Glow
    images: OwnImages
    train_images: int = TRAIN_IMAGES
    device: str = "auto"
    _directions: dict[str, Directions] = field(default_factory=dict)
    _scores: list[Scores] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _far: list[tuple[int, int]] = field(default_factory=list)  # what the measurement that goes on was told last
    _waiting: set[int] = field(default_factory=set)  # threads that wait for its end

    @classmethod
    def open(
        cls,
        name: str,
        best: bool = False,
        device: str = "auto",
        train_images: int = TRAIN_IMAGES,
        images: OwnImages | None = None,
    ) -> OpenRun:
        """Open the run in the folder ``name``.

        Args:
            name: the folder of the run.
            best: open the checkpoint with the best held-out bits/dim rather than the newest.
            device: cpu, cuda, cuda:N or auto.
            train_images: how many training images directions are measured on, at most.
            images: the images of the run, if another checkpoint of it was opened before; they are not used if another
                run was in that place.

        Raises:
            ValueError: it is no run, or what it holds does not fit together; a value outside its range.
        """
        expect(train_images >= 1, "train_images", "a positive whole number", train_images)
        folder, place = RunFolder(name), resolve_device(device)
        checkpoint = folder.load(best)
        # With other names the command that repeats a picture could not be kept in the picture.
        for text in (name, *checkpoint.data.class_names):
            expect(one_line(text), "run", "names of folder and classes without control characters", ascii(text))
        shape = checkpoint.config.model.image_shape
        expect(len(shape) == 3, "run", "a model of images (C, H, W)", f"one of shape {shape}")
        with torch.no_grad():
            model = load_model(checkpoint, str(folder.path), place).freeze()
        checkpoint.model, checkpoint.ema, checkpoint.optimizer = {}, {}, {}  # the model has what is needed of them
        if images is None or not images.belong_to(checkpoint):
            images = OwnImages(checkpoint)
        return cls(name, best, folder, checkpoint, model, images, train_images, device)

    @property
    def n_bins(self) -> int:
        """The number of grey levels that a value of an image can have."""
        return self.checkpoint.data.n_bins

    @property
    def step(self) -> int:
        """How many training steps were done."""
        return int(self.checkpoint.progress["step"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the model is conditioned on; empty without."""
        return self.checkpoint.data.class_names if self.model.config.n_classes is not None else ()

    @property
    def space(self) -> str:
        """The space that edits are made in if none is asked for.

        The noise under an image's own class holds little of the class, so models with classes are edited in latents.
        """
        return "noise" if self.model.config.n_classes is None else "latent"

    def label(self, name: str) -> int:
        """Find the number of a class by its name.

        Raises:
            ValueError: the model does not have it.
        """
        expect(bool(self.classes), "label", "no label, since the model has no classes", repr(name))
        expect(name in self.classes, "label", f"one of {', '.join(self.classes)}", repr(name))
        return self.classes.index(name)

    def x(self, pixels: Tensor) -> Tensor:
        """Turn pixels (n, C, H, W) into the model's input: the middle of each grey level's interval."""
        return middles(pixels, self.n_bins, self.model)

    def y(self, label: int | None) -> Tensor | None:
        """Turn a label into the model's input, (1,); None for a model without classes."""
        return None if label is None else torch.tensor([label], device=self.model._parameter().device)

    def pick(self, image: Image, label: int | None = None) -> Picked:
        """Find the image that a text names.

        Args:
            image: see :func:`~pyglow_fast.studio.words.parse_image`.
            label: the class to take it for, with a model with classes; None: its own, and for a file the likeliest.

        Raises:
            ValueError: there is no such image, or it cannot be read.
        """
        if isinstance(image, HeldOut):
            data, _, held_out = self.images.find()
            check_fits(self.model, data, self.n_bins)
            expect(image.number < len(held_out), "image", f"a held-out image in 0..{len(held_out) - 1}", image.number)
            pixels, labels = data.batch(held_out[image.number : image.number + 1])
            own = int(labels[0]) if labels is not None and self.classes else None
            return self._with_label(pixels[0], label if label is not None else own, image)
        if isinstance(image, Sample):
            drawn = image.draw.drawn(self.model, self.n_bins)
            own = None if drawn.labels is None else int(drawn.labels[image.number])
            pixels = drawn.pixels[image.number].to(torch.uint8)
            return self._with_label(pixels, label if label is not None else own, image)
        return self.pick_file(Path(image.path), image, label)

    def relabelled(self, picked: Picked, label: int | None) -> Picked:
        """Give an image another class; None: its own, or of a file the likeliest. A sample is drawn anew.

        An image that another checkpoint of the run gave becomes what its name means to this one.

        Raises:
            ValueError: the model has no such class.
        """
        own = label is None and bool(self.classes) and isinstance(picked.image, HeldOut)
        if own or isinstance(picked.image, Sample):
            return self.pick(picked.image, label)
        return self._with_label(picked.pixels, label, picked.image)

    def pick_file(
        self,
        source: Path | bytes,
        image: File,
        label: int | None = None,
        most_pixels: int | None = None,
        formats: Sequence[str] | None = None,
    ) -> Picked:
        """Read the image in a file, or in its contents, and bring it to what the model sees.

        What is decoded at all, ``most_pixels`` and ``formats``, is as in :func:`pyglow_fast.data.read_single`.

        Raises:
            UnreadableImageError: it cannot be read, or is too small or too large.
        """
        shape = self.checkpoint.config.model.image_shape
        config = self.checkpoint.config.data
        channels, height, width = shape
        pixels = read_single(source, image.path, config, (channels, height, width), self.n_bins, most_pixels, formats)
        return self._with_label(pixels, label, image)

    def _with_label(self, pixels: Tensor, label: int | None, image: Image) -> Picked:
        if label is not None:
            check_label(label, self.model)
        elif self.classes:
            label = int(likeliest_class(self.model, self.x(pixels[None]))[0])
        return Picked(pixels, label, image)

    def bits(self, pixels: Tensor, label: int | None = None) -> float:
        """Measure the bits/dim of pixels (C, H, W), with the dequantisation noise that is the same at every call."""
        labels = None if label is None else torch.tensor([label])
        names = self.classes if label is not None else ()
        one = ImageSet("image", pixels[None].to(torch.uint8), self.n_bins, labels, names)
        return float(score_images(self.model, one, 1, seed=0).bits_per_dim[0])

    def directions(self, space: str, progress: Progress | None = None) -> Directions:
        """Measure the mean latents of the run's training images with and without each attribute, or read them.

        The means are kept in the folder of the run: they are measured once for a checkpoint, and read from then on
        without the images.

        Raises:
            LostImagesError: they were not measured, and the images of the run are no longer there.
            ValueError: an image that cannot be read.
            AbandonedError: ``progress`` raised it.
        """
        if space not in self._directions:  # those that are there wait for no measurement of others
            with self._alone(progress) as told:
                if space not in self._directions:
                    self._directions[space] = self._measured(space, told)
        return self._directions[space]

    @contextmanager
    def _alone(self, progress: Progress | None) -> Iterator[Progress]:
        """A context in which no other thread measures; until then ``progress`` is told how far the other one is."""
        me = threading.get_ident()
        self._waiting.add(me)
        try:
            while not self._lock.acquire(timeout=LOOK):
                if progress is not None and self._far:
                    progress(*self._far[-1])
        finally:
            self._waiting.discard(me)

        def told(done: int, total: int) -> None:
            self._far[:] = [(done, total)]
            try:
                if progress is not None:
                    progress(done, total)
            except AbandonedError:
                if not self._waiting:
                    raise

        try:
            yield told
        finally:
            self._far.clear()
            self._lock.release()

    def _measured(self, space: str, progress: Progress) -> Directions:
        def compute() -> dict[str, Tensor]:
            data, train, held_out = self.images.find()
            config = self.checkpoint.config
            groups = groups_of(config.data, data, train, held_out, self.train_images, config.seed)
            return measure(self.model, data, groups, space, config.data.on_unreadable, progress)

        key = self._key() | {"space": space, "train_images": self.train_images}
        return from_tensors(kept(self.folder.cache, f"directions-{space}", key, compute), space)

    def scores(self, progress: Progress | None = None) -> Scores:
        """Measure SCORED held-out and SCORED training images in bits/dim, or read what the run's folder keeps of that.

        Raises:
            LostImagesError: they were not scored, and the images of the run are no longer there.
            ValueError: an image that cannot be read.
            AbandonedError: ``progress`` raised it.
        """
        if not self._scores:  # those that are there wait for no measurement of directions
            with self._alone(progress) as told:
                if not self._scores:
                    key = self._key() | {"scored": SCORED}
                    tensors = kept(self.folder.cache, "scores", key, lambda: self._scored(told))
                    self._scores.append(Scores(tensors["held_out"], tensors["train"]))
        return self._scores[0]

    @property
    def has_scores(self) -> bool:
        """Whether :meth:`scores` were measured or read already."""
        return bool(self._scores)

    def scores_at_hand(self, progress: Progress | None = None) -> Scores | None:
        """Return :meth:`scores`; None if the run's images are gone and not scored, or no likelihood is finite."""
        try:
            found = self.scores(progress)
        except (LostImagesError, UnreadableImageError):
            return None
        return found if len(found.train) else None

    def _scored(self, progress: Progress) -> dict[str, Tensor]:
        data, train, held_out = self.images.find()
        policy = self.checkpoint.config.data.on_unreadable
        sides = {"held_out": held_out, "train": train}
        advance = progress_of(sum(min(SCORED, len(side)) for side in sides.values()), progress)
        found = {}
        for name, side in sides.items():
            scores = score_images(
                self.model, data.subset(side), 50, 0, SCORED, on_unreadable=policy, progress=advance
            ).bits_per_dim
            found[name] = scores[scores.isfinite()]
        return found

    def _key(self) -> dict[str, str]:
        return {"digest": self.checkpoint.digest, "images": self.checkpoint.data.fingerprint}
