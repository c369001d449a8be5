"""Checkpoints: one safetensors file with every tensor, and everything else as JSON in its header. Never pickle.

Tensors are ``model.NAME``, ``ema.NAME``, ``optimizer.KIND.NAME`` and ``rank.R.NAME``; the header's ``pyglow_fast``
entry is a JSON object with the format version, the configuration, the progress, the optimizer's groups, what wrote it,
and a digest of all tensors, so that a damaged file never passes for a good one. One file, because one file can be
replaced atomically.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.train.config import TrainConfig
from pyglow_fast.train.files import replacing

FORMAT = 2
_HEADER = "pyglow_fast"
_PARTS = ("model", "ema", "optimizer", "rank")


@dataclass(frozen=True)
class DataStamp:
    """What a run remembers of its images: their ImageSet.fingerprint, number of levels and class names."""

    fingerprint: str
    n_bins: int
    class_names: tuple[str, ...] = ()


@dataclass
class Checkpoint:
    """What a run needs to go on exactly where it was.

    Args:
        config: of the run.
        progress: counters and running sums, JSON-able.
        data: what is remembered of the images.
        model: the model's state dict.
        ema: the average of its weights by parameter name; empty without one.
        optimizer: tensors of the optimizer's state, named ``KIND.PARAMETER``.
        optimizer_groups: the optimizer's param_groups without parameters, JSON-able.
        rank: what each rank has for itself, named ``R.NAME``: states of random generators and of the drift control.
        written_by: versions of what wrote it.
        digest: of all tensors as the file has it, a key for what is computed from them; empty unless it was loaded.
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
            "digest": _digest(tensors),
        }
        with replacing(path) as temporary:
            try:
                save_file(tensors, str(temporary), {_HEADER: json.dumps(header)})
            except SafetensorError as error:  # how it says that the disk is full
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read the file; all tensors come to the CPU.

        Raises:
            ValueError: no such file, a truncated, damaged or foreign one, one of another format, or one that was
                removed or replaced meanwhile.
        """
        name = str(path)
        expect(path.is_file(), name, "a checkpoint file", "a folder" if path.is_dir() else "nothing there")
        try:
            with _open(name) as file:
                text = (file.metadata() or {}).get(_HEADER)
                if text is None:
                    raise ValueError(f"{name}: expected a checkpoint of pyglow_fast, found another safetensors file")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise ValueError(f"{name}: expected a complete safetensors file, found {error}") from error
        header = _parse(name, text)
        expect(
            _digest(tensors) == header["digest"], name, "tensors with the digest that they were saved with", "others"
        )
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in tensors.items():
            part, _, rest = key.partition(".")
            expect(part in parts, name, f"tensors of {sorted(parts)}", repr(key))
            parts[part][rest] = tensor
        try:
            stamp = header["data"]
            return cls(
                config=TrainConfig.from_dict(header["config"]),
                progress=dict(header["progress"]),
                data=DataStamp(stamp["fingerprint"], stamp["n_bins"], tuple(stamp["class_names"])),
                optimizer_groups=[_tuples(group) for group in header["optimizer_groups"]],
                written_by=dict(header["written_by"]),
                digest=header["digest"],
                **parts,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{name}: expected a header written by pyglow_fast, found {error!r} in it") from error

    def load_model(self, model: nn.Module, name: str, averaged: bool = False) -> None:
        """Copy the weights into ``model``.

        Args:
            model: of the architecture that ``config`` describes.
            name: of the checkpoint, for messages.
            averaged: those of the moving average, where there is one.

        Raises:
            ValueError: names or shapes differ; the model is then unchanged.
        """
        weights = self.model | (self.ema if averaged else {})
        check_weights(weights, model, name)
        model.load_state_dict(weights)


def _open(name: str) -> Any:
    """``safe_open``, which opens the file twice: for the header, and again for torch."""
    try:
        return safe_open(name, framework="pt", device="cpu")
    except (FileNotFoundError, RuntimeError) as error:  # the second: from torch
        raise ValueError(f"{name}: expected a file that stays as it is while it is read, found {error}") from error


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON made lists of an optimizer's tuples (Adam's betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _parse(name: str, text: str) -> dict[str, Any]:
    keys = {"format", "config", "progress", "data", "optimizer_groups", "written_by", "digest"}
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
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
    """The optimizer's state by parameter name, which outlives a change of their order, and its groups as plain data."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{kind}.{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return tensors, groups


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises:
        ValueError: a tensor of an unknown parameter or of the wrong shape; the optimizer is then unchanged.
    """
    position = {parameter_name: i for i, (parameter_name, _) in enumerate(model.named_parameters())}
    shapes = {parameter_name: parameter.shape for parameter_name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.optimizer.items():
        kind, _, parameter_name = key.partition(".")
        expect(parameter_name in position, name, "optimizer state of the model's parameters", repr(key))
        fits = kind == "step" or tensor.shape == shapes[parameter_name]
        expect(fits, name, f"optimizer.{key} of shape {tuple(shapes[parameter_name])}", tuple(tensor.shape))
        state.setdefault(position[parameter_name], {})[kind] = tensor
    current = optimizer.state_dict()
    found, wanted = len(checkpoint.optimizer_groups), len(current["param_groups"])
    expect(found == wanted, name, f"{wanted} optimizer groups", found)
    groups = [
        {**saved, "params": group["params"]}
        for saved, group in zip(checkpoint.optimizer_groups, current["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
