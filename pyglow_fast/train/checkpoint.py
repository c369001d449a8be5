"""Checkpoints: one safetensors file with every tensor, and everything else as JSON in its header. Never pickle.

Tensors are ``model.NAME``, ``ema.NAME``, ``optimizer.ENTRY.NAME`` and ``rank.R.NAME``; the header's ``pyglow_fast``
entry is a JSON object with the format version, the configuration, the progress, the optimizer's groups, what wrote it,
and a digest of the file, so that a damaged one never passes for a good one. One file, because one file can be replaced
atomically.

The digest covers every byte of the file, with zeros in the place of the digest itself. A file of another format is
refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.reversible.drift import DriftRecord
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.files import replacing
from pyglow_fast.train.progress import Progress
from pyglow_fast.train.tensor_file import read_header, read_outer, read_tensors

FORMAT = 3
DRIFT = "_extra_state"  # how the names of the states of drift controls end
_HEADER = "pyglow_fast"
_PARTS = ("model", "ema", "optimizer", "rank")


@dataclass(frozen=True)
class DataStamp:
    """What a run remembers of its images: their ImageSet.fingerprint, number of grey levels and class names.

    Examples:
        >>> import torch
        >>> from pyglow_fast.data import ImageSet
        >>> from pyglow_fast.train import DataStamp
        >>> images = ImageSet("mine", torch.zeros(6, 1, 4, 4, dtype=torch.uint8), n_bins=32)
        >>> stamp = DataStamp(images.fingerprint(), images.n_bins)
        >>> stamp == DataStamp(images.subset([0, 1]).fingerprint(), images.n_bins)  # a resumed run must see all of them
        False
    """

    fingerprint: str
    n_bins: int
    class_names: tuple[str, ...] = ()


@dataclass
class Checkpoint:
    """The state of a run at one step: all that it needs to go on exactly where it was.

    Args:
        config: the settings of the run.
        progress: counters and running sums, which JSON can hold.
        data: what is remembered of the images.
        model: the model's state dict.
        ema: the average of its weights by parameter name; empty without one.
        optimizer: tensors of the optimizer's state, named ``ENTRY.PARAMETER``.
        optimizer_groups: the optimizer's param_groups without parameters, which JSON can hold.
        rank: what each rank has for itself, named ``R.NAME``: states of random generators and of the drift control.
        written_by: the versions of the code that wrote it.
        digest: the digest in the file, a key for what is computed from its contents; empty unless the checkpoint was
            loaded.

    Examples:
        >>> from pathlib import Path
        >>> from pyglow_fast import Glow, GlowConfig
        >>> from pyglow_fast.data import load_digits
        >>> from pyglow_fast.train import Checkpoint, TrainConfig, TrainState
        >>> config = TrainConfig(model=GlowConfig((1, 8, 8), n_levels=1, n_steps=1, hidden=4))
        >>> TrainState(config, load_digits()).checkpoint().save(Path("step.safetensors"))
        >>> loaded = Checkpoint.load(Path("step.safetensors"))
        >>> loaded.config == config, loaded.progress["step"]
        (True, 0)
        >>> loaded.load_model(Glow(loaded.config.model), "step.safetensors")  # a new model gets the weights of the file
    """

    config: TrainConfig
    progress: dict[str, Any]
    data: DataStamp
    model: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    optimizer_groups: list[dict[str, Any]] = field(default_factory=list)
    rank: dict[str, Tensor] = field(default_factory=dict)
    written_by: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Raises:
            OSError: it cannot be written; an older file of that name is then unharmed.
        """
        # Clones, since safetensors refuses tensors that share storage and a state dict may hold views.
        tensors = {
            f"{part}.{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for part in _PARTS
            for name, tensor in getattr(self, part).items()
        }
        header = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "progress": self.progress,
            "data": asdict(self.data),
            "optimizer_groups": self.optimizer_groups,
            "written_by": self.written_by,
            "digest": _UNSEALED,
        }
        with replacing(path) as temporary:
            try:
                save_file(tensors, str(temporary), {_HEADER: json.dumps(header)})
            except SafetensorError as error:  # how it says that the disk is full
                raise OSError(str(error)) from error
            _seal(temporary)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read the file; all tensors come to the CPU, and none of them needs the file any more.

        Raises:
            ValueError: no such file, one that cannot be read, a truncated, damaged or foreign one, one of another
                format, or one whose header holds what cannot be.
        """
        name = str(path)
        try:
            what = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing there"
            expect(path.is_file(), name, "a checkpoint file", what)
            with open(path, "rb") as file:  # once: another one may take its place meanwhile
                header, tensors, digest = _read(file, name)
        except OSError as error:
            raise ValueError(f"{name}: expected a checkpoint file that can be read, found {error}") from error
        expect(digest == header["digest"], name, "the digest that it was saved with", "that of other contents")
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, _, rest = key.partition(".")
            expect(part in parts, name, f"tensors of {sorted(parts)}", repr(key))
            parts[part][rest] = tensor
        try:
            Progress.of(header["progress"], "progress")
            return cls(
                config=TrainConfig.from_dict(header["config"]),
                progress=dict(header["progress"]),
                data=_stamp(header["data"]),
                optimizer_groups=_groups(header["optimizer_groups"]),
                written_by=_texts(header["written_by"]),
                digest=header["digest"],
                **parts,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{name}: expected a header written by pyglow_fast, found {error!r} in it") from error

    def load_model(self, model: nn.Module, name: str, averaged: bool = False) -> None:
        """Copy the weights into ``model``.

        Args:
            model: a model of the architecture that ``config`` describes.
            name: the checkpoint's name, for messages.
            averaged: copy the moving average of the weights, where there is one.

        Raises:
            ValueError: names or shapes differ; the model is then unchanged.
        """
        weights = self.model | (self.ema if averaged else {})
        check_weights(weights, model, name)
        model.load_state_dict(weights)


_UNSEALED = "0" * 64
_DIGEST = re.compile(rb'\\"digest\\": \\"([0-9a-f]{64})\\"')  # a JSON text inside a JSON text


def _place_of_digest(outer: bytes, name: str) -> int:
    """Where the digest stands in a file with such a header; refused unless it stands there once."""
    found = list(_DIGEST.finditer(outer))
    expect(len(found) == 1, name, "one digest in the header", len(found))
    return found[0].start(1)


def _unsealed(outer: bytes, place: int) -> bytes:
    """The beginning of a file as it is digested."""
    return outer[:place] + _UNSEALED.encode() + outer[place + len(_UNSEALED) :]


def _seal(path: Path) -> None:
    """Write its digest into a file that was saved without one."""
    with open(path, "r+b") as file:
        outer = read_outer(file)
        digest = hashlib.sha256(outer)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        file.seek(_place_of_digest(outer, str(path)))
        file.write(digest.hexdigest().encode())


def _read(file: BinaryIO, name: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Header, tensors and digest of what an open file has in it."""
    try:
        outer = read_header(file)
    except ValueError as error:
        raise ValueError(f"{name}: expected a complete safetensors file, found {error}") from error
    text: Any = outer.metadata.get(_HEADER)
    expect(isinstance(text, str), name, "a checkpoint of pyglow_fast", "another safetensors file")
    header = _parse(name, text)
    digest = hashlib.sha256(_unsealed(outer.raw, _place_of_digest(outer.raw, name)))
    try:
        tensors = read_tensors(file, outer, digest.update)
    except ValueError as error:
        raise ValueError(f"{name}: expected a complete safetensors file, found {error}") from error
    return header, tensors, digest.hexdigest()


def _stamp(values: Mapping[str, Any]) -> DataStamp:
    """What is remembered of the images.

    Raises:
        ValueError: of another type, or no such images can be.
    """
    fingerprint, n_bins, names = values["fingerprint"], values["n_bins"], values["class_names"]
    expect(isinstance(fingerprint, str), "data.fingerprint", "a text", repr(fingerprint))
    expect(type(n_bins) is int and 2 <= n_bins <= 256, "data.n_bins", "a value in 2..256", repr(n_bins))
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    expect(named, "data.class_names", "a list of texts", repr(names))
    return DataStamp(fingerprint, n_bins, tuple(names))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    texts = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
    expect(texts, "written_by", "texts by name", repr(values))
    return dict(values)


def _groups(found: Any) -> list[dict[str, Any]]:
    """The optimizer's groups, with the tuples of which JSON made lists (Adam's betas).

    Raises:
        ValueError: other than truth values, finite numbers and tuples of them, by name.
    """
    expect(isinstance(found, list), "optimizer_groups", "a list", repr(found))
    groups = []
    for group in found:
        expect(isinstance(group, dict), "optimizer_groups", "settings by name", repr(group))
        groups.append({key: tuple(value) if isinstance(value, list) else value for key, value in group.items()})
        for key, value in groups[-1].items():
            plain = all(map(_is_plain, value if isinstance(value, tuple) else (value,)))
            expect(plain, f"optimizer_groups.{key}", "finite numbers or truth values", repr(value))
    return groups


def _is_plain(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or type(value) is bool or (type(value) is float and math.isfinite(value))


def _parse(name: str, text: str) -> dict[str, Any]:
    keys = {"format", "config", "progress", "data", "optimizer_groups", "written_by", "digest"}
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: expected a JSON header, found {error}") from error
    complete = isinstance(header, dict) and keys <= set(header)
    if isinstance(header, dict) and "format" in header:
        found = header["format"]
        expect(found == FORMAT, name, f"format {FORMAT} (another version of pyglow_fast wrote it)", found)
    expect(complete, name, f"a header with {sorted(keys)}", sorted(header) if isinstance(header, dict) else header)
    return header


def check_weights(weights: dict[str, Tensor], model: nn.Module, name: str) -> None:
    """Refuse weights whose names, shapes or dtypes are not those of ``model``, naming the first difference."""
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    fits = "weights that fit its own configuration"
    expect(not missing, name, fits, f"no tensor {missing[0]!r} ({len(missing)} missing)" if missing else "")
    expect(not extra, name, fits, f"an unknown tensor {extra[0]!r} ({len(extra)} of them)" if extra else "")
    for key, tensor in weights.items():
        want = wanted[key]
        same = tensor.shape == want.shape and tensor.dtype == want.dtype
        expect(
            same, name, f"{key} of shape {tuple(want.shape)}, {want.dtype}", f"{tuple(tensor.shape)}, {tensor.dtype}"
        )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Read the optimizer's state by parameter name, which outlives a change of order, and its groups as plain data."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{entry}.{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


def check_drift(tensors: Mapping[str, Tensor], name: str) -> None:
    """Refuse a state among ``tensors`` that no drift control would take."""
    for key, value in tensors.items():
        if key.endswith(DRIFT):
            try:
                DriftRecord.of_vector(value)
            except ValueError as error:
                raise ValueError(f"{name}: {key}: {error}") from error


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Checkpoint, name: str
) -> dict[str, Any]:
    """Build the state dict for ``optimizer`` from what :func:`optimizer_tensors` gave; the optimizer is not changed.

    Raises:
        ValueError: tensors of an unknown parameter or entry, of a wrong shape or dtype, or not all entries of a
            parameter; groups with other settings than the optimizer has.
    """
    parameters = dict(model.named_parameters())
    position = {parameter_name: i for i, parameter_name in enumerate(parameters)}
    entries = _state_entries(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        entry, _, parameter_name = key.partition(".")
        expect(parameter_name in position, name, "optimizer state of the model's parameters", repr(key))
        expect(entry in entries, name, f"optimizer state with the entries {sorted(entries)}", repr(key))
        like = entries[entry] if entries[entry].dim() == 0 else parameters[parameter_name]
        same = tensor.shape == like.shape and tensor.dtype == like.dtype
        wanted, found = (f"{tuple(item.shape)}, {item.dtype}" for item in (like, tensor))
        expect(same, name, f"optimizer.{key} of shape {wanted}", found)
        state.setdefault(position[parameter_name], {})[entry] = tensor
    whole = all(len(values) == len(entries) for values in state.values())
    expect(whole, name, f"{sorted(entries)} of each parameter that the optimizer has changed", "less")
    current = optimizer.state_dict()
    count, wanted_count = len(checkpoint.optimizer_groups), len(current["param_groups"])
    expect(count == wanted_count, name, f"{wanted_count} optimizer groups", count)
    groups = []
    for saved, group in zip(checkpoint.optimizer_groups, current["param_groups"], strict=True):
        for key, value in saved.items():
            own = group.get(key)  # None: of another version of torch, or one that torch chooses
            alike = key != "params" and (own is None or _common_type(value) == _common_type(own))
            expect(alike, name, f"optimizer_groups.{key} like {own!r}", repr(value))
        groups.append({**saved, "params": group["params"]})
    return {"state": state, "param_groups": groups}


def _common_type(value: Any) -> Any:
    """What settings that may stand for each other have in common."""
    if isinstance(value, tuple):
        return tuple(map(_common_type, value))
    return "number" if type(value) in (int, float) else type(value)


def _state_entries(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What such an optimizer keeps of a parameter of shape (1,), by its name; of any other all but scalars differ."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    other = type(optimizer)([parameter])  # type: ignore[call-arg]
    other.step()
    return dict(other.state[parameter])
