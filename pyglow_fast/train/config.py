"""One dataclass that decides a whole training run, checked on construction; and its files, in TOML.

The tables of a file are ``[data]``, ``[model]`` and on top the other fields. TOML knows no null: there it is "none".
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pyglow_fast import presets
from pyglow_fast._core.errors import expect, visible
from pyglow_fast._core.settings import (
    COMPUTING,
    IMAGES,
    MODEL,
    OPTIMISATION,
    OUTPUT,
    Range,
    check_settings,
    declaration,
    declared_of,
    setting,
    settings,
)
from pyglow_fast.data import DATA_HELP, DataConfig, optional
from pyglow_fast.data.loader import WORKERS
from pyglow_fast.models import GlowConfig
from pyglow_fast.nets.precision import PRECISIONS
from pyglow_fast.runs.setting import MEMORY_EXPECTED, MEMORY_MODES, memory_text, parse_memory
from pyglow_fast.train.figures import PICTURE_IMAGES
from pyglow_fast.train.optim import OPTIMIZERS

LIMITS = presets.LIMITS
_PRODUCTS: dict[str, Any] = {"most": 10**6, "why": "float32 has to hold its products"}
_DEVICES = "'auto', 'cpu', 'cuda' or 'cuda:N'"
_COUNT, _FROM_0 = Range(least=1), Range(least=0)
_FLOAT32 = Range(least=0, most=1e30, why="float32 has to hold it")
# Fields by what they have in common; numbers are counts unless another range is given.
_learning = functools.partial(setting, range=_COUNT, group=OPTIMISATION)
_limit = functools.partial(_learning, adjustable=True)
_computing = functools.partial(setting, group=COMPUTING, adjustable=True)
_output = functools.partial(setting, range=_COUNT, group=OUTPUT, adjustable=True)


@settings
@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run.

    A training step is one update of the weights; a step of the flow is one of the K in each level. max_steps,
    max_epochs and max_minutes are limits: the run ends at whichever comes first, and at least one must be given.

    Values of a wrong type or out of their range, and parts that do not fit each other, are a ValueError.

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

    data: DataConfig = field(
        default_factory=DataConfig, metadata=declaration("which images, see DataConfig", expected="a DataConfig")
    )
    model: GlowConfig = field(
        default_factory=GlowConfig,
        metadata=declaration(
            "the architecture, see GlowConfig; its image_shape must be that of the images", expected="a GlowConfig"
        ),
    )
    class_conditional: bool = setting(False, "one top prior for each class of the images' labels", group=MODEL)
    class_weight: float = _learning(
        0.0,
        "w in the loss, bits/dim of the image + w times the bits that its label costs by a linear classifier on the "
        "top latent (released code: 0.01), with class_conditional or without; 0: no such term",
        range=Range(least=0, **_PRODUCTS),
    )
    optimizer: str = _learning("adam", "adam, adamw or adamax", choices=OPTIMIZERS)
    lr: float = _learning(4e-3, "learning rate after warm-up", range=Range(above=0, **_PRODUCTS))
    warmup_steps: int = _learning(100, "the learning rate rises over so many steps", range=_FROM_0, flag="--warmup")
    max_steps: int | None = _limit(
        10_000, "the run ends after so many training steps; given another limit alone, this one does not count"
    )
    max_epochs: int | None = _limit(None, "or after so many passes over the training images")
    max_minutes: float | None = _limit(None, "or after so many minutes", range=Range(above=0))
    decay_steps: int | None = _learning(
        0,
        "the learning rate falls along a straight line, to 0 at this training step; 0: at the run's last step (where "
        "max_minutes alone bounds it, max_steps is set to as many as a measurement says)",
        range=_FROM_0,
        absent="it stays",
    )
    weight_decay: float = _learning(0.0, "decoupled weight decay, of adamw only", range=Range(least=0, **_PRODUCTS))
    beta2: float = _learning(0.99, "decay of the optimizer's second moment", range=Range(least=0, below=1))
    ema_decay: float | None = _learning(
        None,
        "decay of a moving average of the weights, which evaluation and samples then use",
        range=Range(above=0, below=1),
        absent="no average",
        flag="--ema",
        other=("--no-ema", "no averaged weights"),
    )
    clip_norm: float | None = _learning(
        1.0,
        "gradients are scaled down to this norm (of the loss, which is in bits/dim)",
        range=Range(above=0, most=1e30, why="float32 has to hold it; none is no clipping"),
        absent="no clipping",
        flag="--clip",
        other=("--no-clip", "no clipping"),
    )
    max_skipped: int = _limit(10, "steps in a row without finite loss or gradient before the run ends", range=_FROM_0)
    batch_size: int = _learning(64, "images a training step, over all ranks and accumulated parts together")
    accumulate: int = _limit(1, "parts that a batch is cut into, one after the other, for memory")
    init_images: int = _learning(64, "images that the data-dependent initialisation of actnorm sees")
    memory: str | int = _computing(
        "reversible",
        f"memory mode of training: {', '.join(MEMORY_MODES)}; or the bytes that the tensors of a training step (of a "
        "part where accumulated) may take on each rank beyond parameters and gradients, as a number or a text such as "
        "4GB: the fastest training within them",
        expected=MEMORY_EXPECTED,
    )
    precision: str = _computing("auto", "of the nets: auto (torch's), fp32, tf32, bf16 or fp16", choices=PRECISIONS)
    compile: bool = _computing(False, "train through torch.compile")
    graph: str = _computing(
        "auto",
        "a training step on a GPU as a CUDA graph: auto (where one can hold it; report.html says why if not) or off",
        choices=("auto", "off"),
    )
    workers: int | None = _computing(
        None, "processes that read images", range=WORKERS, absent="none for images in memory, else 2", group=IMAGES
    )
    patience: int | None = _limit(
        5, "the run also ends after so many evaluations without a better held-out score", absent="it does not"
    )
    seed: int = _learning(0, "decides the split, the initial weights, the order of the images and noise", range=_FROM_0)
    threads: int | None = setting(
        None,
        "threads of torch on the CPU; another number sums in another order",
        range=Range(least=1, most=1024, why="torch ends the process where the system has no more"),
        absent="as many as torch chooses",
        group=COMPUTING,
    )
    device: str = _computing("auto", "cpu, cuda, cuda:N or auto (cuda where there is one)", expected=_DEVICES)
    log_every: int = _output(20, "training steps between rows of metrics.csv")
    eval_every: int = _output(500, "training steps between evaluations on held-out images")
    save_every: int = _output(500, "training steps between checkpoints")
    sample_every: int = _output(500, "training steps between pictures of samples")
    eval_images: int = _output(
        1000,
        "during training at most so many images of each side of the split are evaluated, always the same, drawn by the "
        "seed (at the end all that are held out, and at most 10,000 of the others)",
    )
    sample_count: int = _output(64, "images in samples.png", range=PICTURE_IMAGES)
    sample_temperature: float = _output(0.7, "temperature of samples.png", range=_FLOAT32, flag="--temperature")
    keep: int = _output(3, "newest checkpoints that are kept")
    tensorboard: bool = _output(False, "write events for TensorBoard too")
    check_ranks_every: int = _output(500, "training steps after which all ranks compare their weights")

    def __post_init__(self) -> None:
        for name, kind in (("data", DataConfig), ("model", GlowConfig)):
            found = getattr(self, name)
            expect(isinstance(found, kind), name, f"a {kind.__name__}", type(found).__name__)
        object.__setattr__(self, "memory", parse_memory(self.memory))
        check_device(self.device)
        check_settings(self)
        model, weight = self.model, self.class_weight
        decays = self.weight_decay == 0 or self.optimizer == "adamw"
        expect(decays, "weight_decay", f"0 with optimizer {self.optimizer!r} (adamw has it)", self.weight_decay)
        even = self.batch_size % self.accumulate == 0
        expect(even, "accumulate", f"a divisor of batch_size, {self.batch_size}", self.accumulate)
        limited = any(getattr(self, name) is not None for name in LIMITS)
        expect(limited, "max_steps", "a limit, or max_epochs or max_minutes", "none")
        conditioned = (model.n_classes is not None) == self.class_conditional
        expect(conditioned, "model", "n_classes exactly if class_conditional", model.n_classes)
        judged = (model.classify > 0) == (weight > 0)
        expect(judged, "model", "classify above 0 exactly if class_weight is", model.classify)
        no_cond = model.cond_channels == 0
        expect(no_cond, "model", "cond_channels=0 (image sources give no condition)", model.cond_channels)

    @classmethod
    def preset(cls, name: str, data: str | None = None, **given: Any) -> TrainConfig:
        """Make the settings of a preset, see :mod:`pyglow_fast.presets`, for ``data`` or the images it is made for.

        ``given`` are fields of DataConfig, GlowConfig or TrainConfig that come before the preset's.
        """
        images, values = images_for(name, data), presets.resolve(presets.find(name).settings, given)
        unknown = sorted(key for key in given if not any(key in declared_of(section) for section in _SECTIONS))
        expect(not unknown, "preset", "known fields beside it", ", ".join(unknown))
        sections: Any = (cls, DataConfig)
        own, source = ({key: values[key] for key in values if key in declared_of(section)} for section in sections)
        unused: dict[str, Any] = {} if values.get("class_conditional", False) else {"n_classes": None}
        unused |= {} if values.get("class_weight", 0.0) else {"classify": 0}
        model = {key: value for key, value in given.items() if key in declared_of(GlowConfig)}
        own |= {"data": DataConfig(**{"name": images} | source), "model": GlowConfig.preset(name, **unused | model)}
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold; :meth:`from_dict` reads it back."""
        flat = {item.name: getattr(self, item.name) for item in fields(self)}
        shown = {"memory": memory_text(self.memory), "data": asdict(self.data), "model": self.model.to_dict()}
        return flat | shown

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make the settings from what :meth:`to_dict` gave; fields that are missing keep their defaults."""
        data, model = values.get("data", {}), values.get("model", {})
        sections: Any = (("config", values, TrainConfig), ("data", data, DataConfig))
        for name, given, section in sections:
            expect(isinstance(given, Mapping), name, "a mapping", type(given).__name__)
            unknown = sorted(set(given).difference(declared_of(section)))
            expect(not unknown, name, "known keys", ", ".join(unknown))
        return cls(**{**values, "data": DataConfig(**data), "model": GlowConfig.from_dict(model)})

    def changes(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Compare with other settings: {dotted name: (value here, value there)} of everything that differs."""
        here, there = flatten(self.to_dict()), flatten(other.to_dict())
        return {name: (here[name], there[name]) for name in here if here[name] != there[name]}

    def adjusted(self, **values: Any) -> TrainConfig:
        """Change fields that a resumed run may change, in a copy; a limit among them replaces all former limits.

        Those of the data and of the model are named as in ``data.in_memory``, or without what stands before the point.
        """
        here, changed = flatten(self.to_dict()), dict[str, Any]()
        dotted = {name.rpartition(".")[2]: name for name in here}
        for given, value in values.items():
            name = dotted.get(given, given)
            expect(name in here, given, "a setting", "an unknown name")
            was = here[name]
            expect(name in ADJUSTABLE or was == value, given, f"{was!r}, as the run was started with", repr(value))
            changed |= {name: value} if name in ADJUSTABLE else {}
        limits = {name: changed[name] for name in LIMITS if changed.get(name) is not None}
        if any(value != here[name] for name, value in limits.items()):  # one that is repeated changes nothing
            changed = dict.fromkeys(LIMITS) | changed
        data = {name.removeprefix("data."): changed.pop(name) for name in list(changed) if name.startswith("data.")}
        return replace(self, **changed, data=replace(self.data, **data))


_SECTIONS = (DataConfig, GlowConfig, TrainConfig)
# By dotted name, those of the data with "data.": what a resumed run may change, which is how long it goes on, what it
# shows, and by which means it computes the same steps.
ADJUSTABLE = frozenset(
    prefix + name
    for prefix, section in (("", TrainConfig), ("data.", DataConfig))
    for name, declared in declared_of(section).items()
    if declared.rule.adjustable
)
# In a file, which knows no null: "none" in these fields.
OPTIONAL = frozenset(
    name for section in _SECTIONS for name, declared in declared_of(section).items() if declared.optional
)


def images_for(preset: str, data: str | None) -> str:
    """Return ``data``, or where it is None the name of the images that a preset is made for, if they need no folder."""
    found = presets.find(preset)
    wanted = DATA_HELP if found.image_shape is None else f"{found.data} for preset {preset}"
    name = data or found.data_name or ""
    expect(name != "", "data", wanted, "none")
    return name


def check_device(name: str) -> None:
    """Refuse what is not a name of a device; whether there is such a device is not asked."""
    known = isinstance(name, str) and re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name) is not None
    expect(known, "device", _DEVICES, repr(name))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"model": {"hidden": 1}} -> {"model.hidden": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def to_toml(config: TrainConfig) -> str:
    """Write every field of ``config`` as TOML text; :func:`read_config` and TrainConfig.from_dict read it back."""
    values = _each(config.to_dict(), lambda name, value: "none" if value is None else value)
    text: str = optional("tomli_w", "configuration files").dumps(values)
    return text


def read_config(path: Path) -> dict[str, Any]:
    """Read the tables of a file as they are written there; TrainConfig decides which fields they may have."""
    name = str(path)
    expect(path.suffix == ".toml", "config", "a file ending in .toml", repr(name))
    expect(path.is_file(), "config", "an existing file", repr(name))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError, too
        raise ValueError(visible(f"{name}: expected a configuration as TOML, found {error}")) from error
    return _each(values, lambda name, value: None if name in OPTIONAL and value == "none" else value)


def _each(values: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The tables with every value changed."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found[name] = {key: change(key, item) for key, item in value.items()} if inner else change(name, value)
    return found
