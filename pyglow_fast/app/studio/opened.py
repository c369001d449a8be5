"""Opens a checkpoint of a run to look at: its frozen model, its images, and what was measured of both."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pyglow_fast._core.errors import expect, visible
from pyglow_fast._core.files import write_bytes
from pyglow_fast.app.studio.directions import Directions, from_tensors, measure
from pyglow_fast.app.studio.reading import BATCH, PARTS, Selection, brought_to, config_for, middles
from pyglow_fast.app.studio.words import Draw, File, HeldOut, Image
from pyglow_fast.data import Images, ImageSet, MissingExtraError, load_data, read_single, split
from pyglow_fast.data.sources import SHIPPED
from pyglow_fast.latents import likeliest_class
from pyglow_fast.likelihood import not_finite
from pyglow_fast.models import Glow
from pyglow_fast.train.bar import progress_line
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.evaluation import check_fits, device_of, score_images
from pyglow_fast.train.figures import class_cycle, to_pixels
from pyglow_fast.train.ranks import resolve_device
from pyglow_fast.train.run_folder import RunFolder, load_model
from pyglow_fast.train.seeds import random_subset

MEASURED = 5000  # most training images that directions are measured on
SCORED = 1000  # images of each side that bits/dim are compared with
MOST_FAR = 0.01  # share of the held-out images at either end that their range of bits/dim leaves out
ENOUGH = 20  # held-out images, to say what is far from them
MOST_KEPT = 4  # files of one name: those of the newest checkpoints, or of other settings
SHOWN = "shown"  # the name of the small model that comes with the package


class Picked(NamedTuple):
    """An image that was chosen: its pixels, uint8 (C, H, W), its label (for a model with classes), and its name."""

    pixels: Tensor
    label: int | None
    image: Image


class Drawn(NamedTuple):
    """Samples as pixels (n, C, H, W), their labels (n,) or None, and which were not finite (now grey)."""

    pixels: Tensor
    labels: Tensor | None
    not_finite: list[int]


class Scores(NamedTuple):
    """The finite bits/dim of some held-out and some training images of a run, float64."""

    held_out: Tensor
    train: Tensor

    def share_below(self, bits: float) -> float:
        """The share of the held-out images with fewer bits/dim; NaN without any."""
        return float((self.held_out < bits).double().mean()) if len(self.held_out) else math.nan

    def bounded(self, bits: float) -> float:
        """Clamp bits/dim to the range of the held-out images but for MOST_FAR, made three times as long.

        Fewer than ENOUGH of them have no range.
        """
        if len(self.held_out) < ENOUGH:
            return bits
        low, high = self.held_out.quantile(self.held_out.new_tensor([MOST_FAR, 1.0 - MOST_FAR])).tolist()
        return min(max(bits, 2 * low - high), 2 * high - low)


def find_run(name: str, last: bool = False) -> tuple[RunFolder, bool]:
    """Find the folder of a run, and whether its best checkpoint is taken: where there is one and not ``last``."""
    if name != SHOWN or Path(name).exists():
        folder = RunFolder(name)
        return folder, folder.best.is_file() and not last
    expect(SHIPPED.is_dir(), "run", "the folder of a run", "none, and this copy of pyglow_fast comes without a model")
    return RunFolder(SHIPPED), True


def kept(folder: Path, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors computed for ``key``: read from ``folder`` if they are there, else computed and written.

    The key is all that they depend on. A folder that cannot be written is no error: a warning says that the next time
    will take as long.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{name}-{digest[:16]}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):  # not there, or damaged
        tensors = compute()
    try:
        folder.mkdir(exist_ok=True)
        write_bytes(path, save(tensors))
        for old in sorted(folder.glob(f"{name}-*.safetensors"), key=lambda file: file.stat().st_mtime)[:-MOST_KEPT]:
            old.unlink()
    except OSError as error:
        warnings.warn(visible(f"{path}: not kept, and computed anew the next time ({error})"), stacklevel=2)
    return tensors


@dataclass(eq=False)
class OpenRun:
    """One checkpoint of a run, opened to look at and to make pictures with."""

    name: str  # the run's folder, as it was given
    last: bool  # whether the newest checkpoint was asked for, not the one with the best held-out bits/dim
    folder: RunFolder
    checkpoint: Checkpoint  # without the weights
    model: Glow  # frozen
    device: str = "auto"  # as it was asked for; another one draws other samples
    _images: tuple[Images, Tensor, Tensor] | None = None
    _measured: dict[str, Any] = field(default_factory=dict)  # directions and scores, once they were asked for
    _lock: Any = field(default_factory=threading.RLock)  # of all that is loaded or measured when it is asked for

    @classmethod
    def open(cls, name: str, last: bool = False, device: str = "auto") -> OpenRun:
        """Open the run in the folder ``name``, or refuse what is no run or does not fit together.

        Args:
            name: the folder of the run, or "shown".
            last: open the newest checkpoint rather than the one with the best held-out bits/dim.
            device: cpu, cuda, cuda:N or auto.
        """
        place, (folder, taken) = resolve_device(device), find_run(name, last)
        checkpoint = folder.load(taken)
        shape = checkpoint.config.model.image_shape
        expect(len(shape) == 3, "run", "a model of images (C, H, W)", f"one of shape {shape}")
        with torch.no_grad():
            model = load_model(checkpoint, str(folder.path), place).freeze()
        checkpoint.model, checkpoint.ema, checkpoint.optimizer = {}, {}, {}  # the model has what is needed of them
        return cls(name, last, folder, checkpoint, model, device)

    @property
    def n_bins(self) -> int:
        """The number of grey levels that a value of an image can have."""
        return self.checkpoint.data.n_bins

    @property
    def step(self) -> int:
        """The number of training steps that were done."""
        return int(self.checkpoint.progress["step"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the model is conditioned on; empty without."""
        return self.checkpoint.data.class_names if self.model.config.n_classes is not None else ()

    @property
    def source(self) -> str:
        """The name of the run's own images."""
        return self.checkpoint.config.data.name

    @property
    def space(self) -> str:
        """The space that edits are made in."""
        # The noise under an image's own class holds little of the class.
        return "noise" if self.model.config.n_classes is None else "latent"

    def images(self) -> tuple[Images, Tensor, Tensor]:
        """Load (all images of the run, indices of the training images, of the held-out ones), once.

        Raises:
            ValueError: they are no longer where they were, or have changed since.
        """
        with self._lock:
            if self._images is None:
                config = self.checkpoint.config
                try:
                    data = load_data(config.data)
                except (OSError, MissingExtraError) as error:
                    raise ValueError(str(error)) from error
                same = data.fingerprint() == self.checkpoint.data.fingerprint
                expect(same, "data", f"the images of {config.data.name} that the run was trained on", "others")
                self._images = (data, *split(data, config.data.held_out, config.seed))
            return self._images

    def plainest(self) -> int:
        """Find the held-out image to which most can be added: attributes that others of its class have and it lacks."""
        data, _, held_out = self.images()
        if data.attributes is None:
            return 0
        has, usual = data.attributes.has, data.attributes.has.any(0)
        if data.labels is not None:
            usual = torch.stack([has[data.labels == i].any(0) for i in range(len(data.class_names))])[data.labels]
        return int((usual & ~has)[held_out].sum(1).argmax())

    def label(self, name: str) -> int:
        """Find the number of a class by its name; one that the model does not have is refused."""
        known = f"one of {', '.join(self.classes)}" if self.classes else "no label, since the model has no classes"
        expect(name in self.classes, "label", known, repr(name))
        return self.classes.index(name)

    def x(self, pixels: Tensor) -> Tensor:
        """Turn pixels (n, C, H, W) into the model's input: the middle of each grey level's interval."""
        return middles(pixels, self.n_bins, self.model)

    def y(self, label: int | None) -> Tensor | None:
        """Turn a label into the model's input, (1,); None for a model without classes."""
        return None if label is None else torch.tensor([label], device=device_of(self.model))

    def drawn(self, draw: Draw) -> Drawn:
        """Draw samples; a class that the model does not have is refused."""
        device = device_of(self.model)
        y = class_cycle(draw.n, self.model.config.n_classes, device)
        count = len(self.classes)
        known = f"a class in 0..{count - 1}" if count else "no label, since the model has no classes"
        for label in draw.labels:
            expect(0 <= label < count, "label", known, label)
        if draw.labels:
            y = torch.tensor(draw.labels, device=device)[torch.arange(draw.n, device=device) % len(draw.labels)]
        generator, found = torch.Generator(device).manual_seed(draw.seed), []
        for first in range(0, draw.n, BATCH):
            count = min(BATCH, draw.n - first)
            part = None if y is None else y[first : first + count]
            found.append(self.model.sample(count, draw.temperature, y=part, generator=generator))
        x = torch.cat(found)
        return Drawn(to_pixels(x, self.n_bins).cpu(), None if y is None else y.cpu(), not_finite(x))

    def pick(self, image: Image, label: int | None = None) -> Picked:
        """Find an image, and its class: by default its own, of a file the likeliest. What is not there is refused."""
        if isinstance(image, File):
            return self.pick_file(Path(image.path), image, label)
        if isinstance(image, HeldOut):
            data, _, held_out = self.images()
            check_fits(self.model, data, self.n_bins)
            expect(image.number < len(held_out), "image", f"a held-out image in 0..{len(held_out) - 1}", image.number)
            pixels, labels = data.batch(held_out[image.number : image.number + 1])
        else:
            drawn = self.drawn(image.draw)
            pixels, labels = drawn.pixels[image.number :].byte(), drawn.labels
            labels = None if labels is None else labels[image.number :]
        own = int(labels[0]) if labels is not None and self.classes else None
        return self.picked(pixels[0], image, own if label is None else label)

    def pick_file(self, path: Path, image: File, label: int | None = None, most_pixels: int | None = None) -> Picked:
        """Read the image in a file as the model sees it; see pyglow_fast.data.read_single."""
        config = self.checkpoint.config
        channels, height, width = config.model.image_shape
        shape = (channels, height, width)
        pixels = read_single(path, image.path, config.data, shape, self.n_bins, most_pixels)
        return self.picked(pixels, image, label)

    def picked(self, pixels: Tensor, image: Image, label: int | None = None) -> Picked:
        """Take pixels, uint8 (C, H, W), of the class ``label``; None: of the likeliest one."""
        if label is None and self.classes:
            label = int(likeliest_class(self.model, self.x(pixels[None]))[0])
        return Picked(pixels, label, image)

    def select(self, name: str | None = None, part: str | None = None) -> Selection:
        """Load the images ``name`` (see DATA_HELP) prepared for the model, of which ``part`` (see PARTS) is looked at.

        By default the run's own images, and held-out of these, all of any others. What does not fit is refused.
        """
        if name is None:
            data, train, held_out = self.images()
        else:
            config, stamp = self.checkpoint.config, self.checkpoint.data
            data = brought_to(self.model, self.n_bins, load_data(config_for(name, config.data, self.model)))
            check_fits(self.model, data, self.n_bins, labelled=False)  # foreign ones are scored over all classes
            if data.fingerprint() != stamp.fingerprint:
                expect(part in (None, "all"), "part", "all, since these are not the images of the run", part)
                return Selection(data, torch.arange(len(data)), None, "all")
            train, held_out = split(data, config.data.held_out, config.seed)
        check_fits(self.model, data, self.n_bins)
        part = part or PARTS[0]
        positions = {"held-out": held_out, "train": train, "all": torch.arange(len(data))}[part]
        return Selection(data if part == "all" else data.subset(positions), positions, data.subset(train), part)

    def trained_on(self) -> Images | None:
        """Load the training images, if they are still where they were and as they were."""
        try:
            data, train, _ = self.images()
        except ValueError:
            return None
        return data.subset(train)

    def bits(self, pixels: Tensor, label: int | None = None) -> float:
        """Measure the bits/dim of pixels (C, H, W), with the dequantisation noise that is the same at every call."""
        labels = None if label is None else torch.tensor([label])
        names = self.classes if label is not None else ()
        one = ImageSet("image", pixels[None].to(torch.uint8), self.n_bins, labels, names)
        return float(score_images(self.model, one, 1, seed=0).bits_per_dim[0])

    def directions(self) -> Directions:
        """Measure the mean latents of training images with and without each attribute, or read what was kept of that.

        Where that is not kept and the images of the run are no longer there, it raises ValueError.
        """

        def compute() -> dict[str, Tensor]:
            data, train, _ = self.images()
            chosen = train[random_subset(self.checkpoint.config.seed, len(train), min(MEASURED, len(train)))]
            return measure(self.model, data, chosen, self.space)

        found: Directions = self._once(f"directions-{self.space}", MEASURED, compute, from_tensors)
        return found

    def scores(self) -> Scores:
        """Measure SCORED held-out and SCORED training images in bits/dim, or read what the run's folder keeps of that.

        Where that is not kept and the images of the run are no longer there, it raises ValueError.
        """

        def compute() -> dict[str, Tensor]:
            data, train, held_out = self.images()
            policy, found = self.checkpoint.config.data.on_unreadable, {}
            total = sum(min(SCORED, len(side)) for side in (held_out, train))
            with progress_line("bits/dim of the run's images", total) as line:
                for name, side in (("held_out", held_out), ("train", train)):
                    how: dict[str, Any] = {"on_unreadable": policy, "progress": line.update}
                    bits = score_images(self.model, data.subset(side), 50, 0, SCORED, **how).bits_per_dim
                    found[name] = bits[bits.isfinite()]
            return found

        found: Scores = self._once("scores", SCORED, compute, lambda tensors: Scores(**tensors))
        return found

    def scores_at_hand(self, wait: bool = True) -> Scores | None:
        """Return :meth:`scores`; None without any that is finite, or where they were not measured and cannot be.

        With ``wait`` False nothing is measured now.
        """
        try:
            found = self.scores() if wait else self._measured.get("scores")
        except ValueError:
            return None
        return found if found and len(found.held_out) else None

    def _once(self, name: str, most: int, compute: Callable[[], dict[str, Tensor]], make: Callable[..., Any]) -> Any:
        """Return what ``make`` makes of tensors that are computed now, or were :func:`kept` in the run's folder."""
        if name not in self._measured:  # what is there waits for no measurement of others
            with self._lock:
                if name not in self._measured:
                    key = {"digest": self.checkpoint.digest, "images": self.checkpoint.data.fingerprint, "most": most}
                    self._measured[name] = make(kept(self.folder.cache, name, key, compute))
        return self._measured[name]
