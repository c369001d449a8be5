"""One dataclass that decides a whole training run, checked on construction and kept in the run folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pyglow_fast import presets
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.precision import PRECISIONS
from pyglow_fast.data import DATA_HELP, DataConfig
from pyglow_fast.data.loader import MOST_WORKERS
from pyglow_fast.models import GlowConfig
from pyglow_fast.reversible.setting import memory_text, parse_memory
from pyglow_fast.train.figures import MOST_IMAGES
from pyglow_fast.train.optim import OPTIMIZERS

LIMITS = presets.LIMITS
EVERY = ("log", "eval", "save", "sample")
# What a resumed run may change: how long it goes on, what it shows, and by which means it computes the same steps.
ADJUSTABLE = frozenset(
    {*LIMITS, "patience", "device", "workers", "memory", "precision", "compile", "cuda_graphs", "accumulate"}
    | {f"{what}_every" for what in EVERY}
    | {"eval_images", "sample_count", "sample_temperature", "keep", "tensorboard", "check_ranks_every", "max_skipped"}
    | {"data.on_unreadable"}
)
# In a file, which knows no null: "none" in these fields.
OPTIONAL = frozenset(
    {"ema_decay", "decay_steps", "clip_norm", "patience", "threads", "workers", *LIMITS}
    | {"size", "n_bits", "held_out", "scale", "attribute", "in_memory", "n_classes", "n_splits"}
)


# Above these a value is a slip of the pen, and what came of it would say less: a traceback, or no end.
_BOUNDS: dict[str, tuple[float, str]] = {
    "workers": (MOST_WORKERS, "each is a process with torch in it"),
    "threads": (1024, "torch ends the process where the system has no more"),
    "sample_count": (MOST_IMAGES, "all of them are in one picture"),
    "lr": (10**6, "float32 has to hold its products"),
    "weight_decay": (10**6, "float32 has to hold its products"),
    "class_weight": (10**6, "float32 has to hold its products"),
    "clip_norm": (1e30, "float32 has to hold it; none is no clipping"),
    "sample_temperature": (1e30, "float32 has to hold it"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    Args:
        data: which images; see DataConfig.
        model: the architecture; its image_shape must be that of the images.
        class_conditional: condition the top prior on the labels; the model's n_classes must then be that of the data.
        class_weight: w in the loss, bits/dim of the image + w times the bits that its label costs by the head on the
            top latent (released code, weight_y: 0.01 in its commands); 0: no such term. The model's classify must then
            be the number of classes. With or without class_conditional.
        optimizer: "adam", "adamw" or "adamax".
        lr: learning rate after warm-up.
        warmup_steps: the learning rate rises linearly over the first so many steps.
        decay_steps: the learning rate then falls along half a cosine, to a hundredth at this step; None: it stays.
        weight_decay: decoupled, of adamw only.
        beta2: decay of the optimizer's second moment (Adamax: of its largest gradient).
        ema_decay: evaluation and samples use a moving average of the weights with this decay, see Ema; None: not so.
        clip_norm: gradients are scaled down to this norm (of the loss, which is in bits/dim); None for no clipping.
        max_skipped: steps in a row whose loss or gradient is not finite and that are left out before the run ends.
        batch_size: images a step, over all ranks and accumulated parts together.
        accumulate: parts that a batch is cut into, one after the other, for memory.
        init_images: images that the data-dependent initialisation sees.
        memory: memory mode of training: "reversible", "checkpoint" or "store"; or the bytes that the tensors of a step
            may take on each rank beyond parameters and gradients, as a number or a text such as "4GB" (then kept as an
            int): the fastest training within them. Of a part where accumulated.
        precision: of the nets in training: "auto", "fp32", "tf32", "bf16" or "fp16".
        compile: train through torch.compile.
        cuda_graphs: train through a CUDA graph; on one GPU, without accumulation and without class_weight.
        workers: processes that read images; None: none for images in memory, else 2.
        max_steps, max_epochs, max_minutes: the run ends at whichever comes first; at least one must be given.
        patience: the run also ends after so many evaluations without a better held-out score.
        seed: of the split, the initial weights, the order of the images and the dequantisation noise.
        threads: of torch on the CPU; None: as many as torch chooses. Another number sums in another order.
        device: "cpu", "cuda", "cuda:N" or "auto" (cuda where there is one).
        log_every, eval_every, save_every, sample_every: in steps.
        eval_images: during training at most so many images of each side of the split are evaluated, always the same,
            drawn by the seed (at the end all that are held out, and at most 10,000 of the others).
        sample_count, sample_temperature: of samples.png.
        keep: newest checkpoints that are kept.
        tensorboard: write events for TensorBoard too.
        check_ranks_every: steps after which all ranks compare their weights.

    Raises:
        ValueError: a value of the wrong type or out of its range, or parts that do not fit each other.

    Examples:
        >>> from pyglow_fast import GlowConfig
        >>> from pyglow_fast.train import TrainConfig
        >>> config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=2, n_steps=4, hidden=32), max_steps=1000)
        >>> longer = config.adjusted(max_steps=2000)
        >>> config.changes(longer)
        {'max_steps': (1000, 2000)}
        >>> TrainConfig.from_dict(longer.to_dict()) == longer
        True
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: GlowConfig = field(default_factory=GlowConfig)
    class_conditional: bool = False
    class_weight: float = 0.0
    optimizer: str = "adam"
    lr: float = 1e-3
    warmup_steps: int = 100
    decay_steps: int | None = None
    weight_decay: float = 0.0
    beta2: float = 0.999
    ema_decay: float | None = 0.999
    clip_norm: float | None = 1.0
    max_skipped: int = 10
    batch_size: int = 64
    accumulate: int = 1
    init_images: int = 256
    memory: str | int = "reversible"
    precision: str = "auto"
    compile: bool = False
    cuda_graphs: bool = False
    workers: int | None = None
    max_steps: int | None = 10_000
    max_epochs: int | None = None
    max_minutes: float | None = None
    patience: int | None = None
    seed: int = 0
    threads: int | None = None
    device: str = "auto"
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 500
    sample_every: int = 500
    eval_images: int = 1000
    sample_count: int = 64
    sample_temperature: float = 0.7
    keep: int = 3
    tensorboard: bool = False
    check_ranks_every: int = 500

    def __post_init__(self) -> None:
        expect(isinstance(self.data, DataConfig), "data", "a DataConfig", type(self.data).__name__)
        expect(isinstance(self.model, GlowConfig), "model", "a GlowConfig", type(self.model).__name__)
        for name in ("class_conditional", "compile", "cuda_graphs", "tensorboard"):
            expect(type(getattr(self, name)) is bool, name, "true or false", getattr(self, name))
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            expect(getattr(self, name) in known, name, f"one of {known}", repr(getattr(self, name)))
        object.__setattr__(self, "memory", parse_memory(self.memory))
        check_device(self.device)
        every = (f"{what}_every" for what in (*EVERY, "check_ranks"))
        for name in ("batch_size", "accumulate", "init_images", "eval_images", "sample_count", "keep", *every):
            self._check_int(name, 1)
        for name in ("warmup_steps", "seed", "max_skipped"):
            self._check_int(name, 0)
        self._check_number("lr", positive=True)
        self._check_number("weight_decay")
        self._check_number("class_weight")
        self._check_number("beta2")
        expect(self.beta2 < 1, "beta2", "a number from 0 to below 1", self.beta2)
        self._check_number("sample_temperature")
        decays = self.weight_decay == 0.0 or self.optimizer == "adamw"
        expect(decays, "weight_decay", f"0 with optimizer {self.optimizer!r} (adamw has it)", self.weight_decay)
        for name in ("max_steps", "max_epochs", "decay_steps", "threads", "patience"):
            if getattr(self, name) is not None:
                self._check_int(name, 1)
        if self.workers is not None:
            self._check_int("workers", 0)
        for name in ("clip_norm", "max_minutes", "ema_decay"):
            if getattr(self, name) is not None:
                self._check_number(name, positive=True)
        averages = self.ema_decay is None or self.ema_decay < 1
        expect(averages, "ema_decay", "a number between 0 and 1, or none", self.ema_decay)
        even = self.batch_size % self.accumulate == 0
        expect(even, "accumulate", f"a divisor of batch_size, {self.batch_size}", self.accumulate)
        graphed = not self.cuda_graphs or (self.accumulate == 1 and not self.compile)
        expect(graphed, "cuda_graphs", "no accumulation and no torch.compile beside it", "one of them")
        plain = not self.cuda_graphs or self.class_weight == 0
        expect(plain, "cuda_graphs", "class_weight 0 beside it (a graph has the likelihood alone)", self.class_weight)
        limited = any(getattr(self, name) is not None for name in LIMITS)
        expect(limited, "max_steps", "a limit, or max_epochs or max_minutes", "none")
        conditioned = self.model.n_classes is not None
        expect(
            conditioned == self.class_conditional,
            "model",
            "n_classes exactly if class_conditional",
            self.model.n_classes,
        )
        judged = (self.model.classify > 0) == (self.class_weight > 0)
        expect(judged, "model", "classify above 0 exactly if class_weight is", self.model.classify)
        no_cond = self.model.cond_channels == 0
        expect(no_cond, "model", "cond_channels=0 (image sources give no condition)", self.model.cond_channels)

    def _check_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int) and not isinstance(value, bool) and value >= low
        found = repr(value) if isinstance(value, str) else value
        expect(ok, name, "a positive whole number" if low else "a whole number, 0 or more", found)
        self._check_bound(name, 2**63 - 1)

    def _check_number(self, name: str, positive: bool = False) -> None:
        value = getattr(self, name)
        ok = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
        ok = ok and (value > 0 if positive else value >= 0)
        found = repr(value) if isinstance(value, str) else value
        expect(ok, name, "a positive number" if positive else "a number, 0 or more", found)
        self._check_bound(name, math.inf)

    def _check_bound(self, name: str, most: float) -> None:
        value = getattr(self, name)
        most, why = _BOUNDS.get(name, (most, "64 bits hold no more"))
        expect(value <= most, name, f"at most {most} ({why})", value)

    @classmethod
    def preset(cls, name: str, data: str | None = None, **given: Any) -> TrainConfig:
        """Make the settings of a preset, see :mod:`pyglow_fast.presets`; its images are not looked for.

        Args:
            name: of the preset.
            data: the name of the images, for DataConfig; None: those that the preset is made for.
            given: fields of DataConfig, GlowConfig or TrainConfig, by name, which come before the preset's.

        Raises:
            ValueError: no such preset, an unknown field, no ``data`` where a folder must be named, or a value that is
                refused.
        """
        preset = presets.find(name)
        images = images_for(name, data)
        known = {kind: {item.name for item in fields(kind)} for kind in (DataConfig, GlowConfig, cls)}
        unknown = sorted(set(given) - set().union(*known.values()))
        expect(not unknown, "preset", "known fields beside it", ", ".join(unknown))
        values = presets.resolve(preset.settings, given)

        def among(names: set[str], values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in values.items() if key in names}

        source = DataConfig(**{"name": images, **among(known[DataConfig], values)})
        unused: dict[str, Any] = {} if values.get("class_conditional", False) else {"n_classes": None}
        unused |= {} if values.get("class_weight", 0.0) else {"classify": 0}
        model = GlowConfig.preset(name, **unused | among(known[GlowConfig], given))
        return cls(**{**among(known[cls], values), "data": source, "model": model})

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold; :meth:`from_dict` reads it back."""
        flat = {item.name: getattr(self, item.name) for item in fields(self)}
        shown = {"memory": memory_text(self.memory), "data": asdict(self.data), "model": self.model.to_dict()}
        return flat | shown

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make the settings from what :meth:`to_dict` gave; fields that are missing keep their defaults.

        Raises:
            ValueError: an unknown key, or a value that is refused.
        """
        expect(isinstance(values, Mapping), "config", "a mapping", type(values).__name__)
        for name, kind, given in (("config", cls, values), ("data", DataConfig, values.get("data", {}))):
            expect(isinstance(given, Mapping), name, "a mapping", type(given).__name__)
            unknown = sorted(set(given) - {item.name for item in fields(kind)})
            expect(not unknown, name, "known keys", ", ".join(unknown))
        parsed = dict(values)
        if "data" in values:
            parsed["data"] = DataConfig(**values["data"])
        if "model" in values:
            parsed["model"] = GlowConfig.from_dict(values["model"])
        return cls(**parsed)

    def changes(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Compare with other settings: {dotted name: (value here, value there)} of everything that differs."""
        here, there = flatten(self.to_dict()), flatten(other.to_dict())
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}

    def adjusted(self, **values: Any) -> TrainConfig:
        """Change fields that a resumed run may change, in a copy; those of the data are named ``data.NAME``.

        A limit among them replaces all former limits.

        Raises:
            ValueError: a field that would make the resumed run another run.
        """
        here = flatten(self.to_dict())
        for name, value in values.items():
            expect(name in here, name, "a setting", "an unknown name")
            was = here[name]
            expect(name in ADJUSTABLE or was == value, name, f"{was!r}, as the run was started with", repr(value))
        changed = {name: value for name, value in values.items() if name in ADJUSTABLE}
        if any(changed.get(name) is not None for name in LIMITS):
            changed = dict.fromkeys(LIMITS) | changed
        data = {name.removeprefix("data."): changed.pop(name) for name in list(changed) if name.startswith("data.")}
        return replace(self, **changed, data=replace(self.data, **data))


def images_for(preset: str, data: str | None) -> str:
    """Return ``data``, or where it is None the name of the images that a preset is made for.

    Raises:
        ValueError: no such preset; or no ``data`` for one that is made for any images, or for those in some folder.
    """
    found = presets.find(preset)
    wanted = DATA_HELP if found.image_shape is None else f"{found.data} for preset {preset}"
    name = data or found.data_name
    expect(name is not None, "data", wanted, "none")
    assert name is not None  # for the type checker: refused above
    return name


def check_device(name: str) -> None:
    """Refuse what is not a name of a device; whether there is such a device is not asked."""
    known = isinstance(name, str) and re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name) is not None
    expect(known, "device", "'auto', 'cpu', 'cuda' or 'cuda:N'", repr(name))
    expect(len(name) <= len("cuda:255"), "device", "a number of at most three digits behind 'cuda:'", repr(name))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"model": {"hidden": 1}} -> {"model.hidden": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
