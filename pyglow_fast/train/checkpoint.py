"""Checkpoints: one safetensors file with every tensor, and everything else as JSON in its metadata. Never pickle.

Tensors are ``model.NAME``, ``ema.NAME``, ``optimizer.ENTRY.NAME`` and ``rank.R.NAME``. The metadata's ``pyglow_fast``
entry has all else, and the digest of all bytes of the file, with zeros in the place of the digest itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import replacing
from pyglow_fast.functional import info
from pyglow_fast.train.config import TrainConfig

FORMAT = 3
DRIFT = "_extra_state"  # how the names of the states of drift controls end
_HEADER = "pyglow_fast"
_PARTS = ("model", "ema", "optimizer", "rank")
_UNSEALED = b"0" * 64


@dataclass
class Progress:
    """The counters of a run, all plain numbers that JSON can hold."""

    step: int = 0
    seconds: float = 0.0  # over all parts of the run
    loss_sum: float = 0.0  # of the running mean since the last row of metrics.csv, in bits/dim, and how many steps
    steps_summed: int = 0
    best: float | None = None  # lowest held-out bits/dim so far, its step, and how many evaluations came since
    best_step: int = 0
    stale: int = 0
    skipped: int = 0  # steps that were left out, in all and just before now
    skipped_in_row: int = 0
    unreadable: int = 0  # images that could not be read and had another one in their place
    class_sum: float = 0.0  # as loss_sum, of the bits that the labels cost


@dataclass(frozen=True)
class DataStamp:
    """The facts by which a run knows its images again: fingerprint, number of grey levels and class names."""

    fingerprint: str
    n_bins: int
    class_names: tuple[str, ...] = ()


_KINDS = {"fingerprint": str, "n_bins": int, "class_names": list}
_KINDS |= {key: type(value) for key, value in asdict(Progress()).items() if key != "best"}


@dataclass
class Checkpoint:
    """The state of a run at one step: all that it needs to go on exactly where it was."""

    config: TrainConfig
    progress: dict[str, Any]  # the fields of Progress
    data: DataStamp
    model: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)  # averaged weights by parameter name; empty without an average
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # named ENTRY.PARAMETER
    rank: dict[str, Tensor] = field(default_factory=dict)  # R.NAME: random generators and drift control of each rank
    written_by: dict[str, str] = field(default_factory=dict)
    digest: str = ""  # that of the file, a key for what is computed of it; empty unless the checkpoint was loaded

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; an older one of that name is unharmed then."""
        tensors = {
            f"{part}.{name}": tensor.detach().to("cpu", copy=True).contiguous()  # safetensors refuses shared storage
            for part in _PARTS
            for name, tensor in getattr(self, part).items()
        }
        header = {
            "digest": _UNSEALED.decode(),  # the first of such zeros in the file: metadata come before all else
            "format": FORMAT,
            "config": self.config.to_dict(),
            "progress": self.progress,
            "data": asdict(self.data),
            "written_by": self.written_by,
        }
        data = safetensors.torch.save(tensors, {_HEADER: json.dumps(header)})
        del tensors  # what is written is held but once
        place = data.index(_UNSEALED)
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(data[:place])
            file.write(hashlib.sha256(data).hexdigest().encode())
            file.write(memoryview(data)[place + len(_UNSEALED) :])

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read the file, or refuse it by a ValueError: one that is not there, damaged, foreign or of another format."""
        name = str(path)
        expect(path.is_file(), name, "a checkpoint file", "a folder" if path.is_dir() else "nothing there")
        try:
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
            header = json.loads(metadata.get(_HEADER, "{}"), parse_constant=int)  # which NaN is not
        except (OSError, SafetensorError, ValueError, RecursionError) as error:  # JSON may be nested too deeply
            raise ValueError(f"{name}: expected a complete safetensors file, found {error}") from error
        header = header if isinstance(header, dict) else {}
        found = header.get("format", "another safetensors file")
        expect(found == FORMAT, name, f"a checkpoint of pyglow_fast's format {FORMAT}", found)
        digest = str(header.get("digest")).encode(errors="replace")
        place, sealed = data.find(digest), hashlib.sha256()
        for part in (memoryview(data)[:place], _UNSEALED, memoryview(data)[place + len(digest) :]):
            sealed.update(part)
        whole = sealed.hexdigest().encode() == digest
        expect(whole, name, "the digest that it was saved with", "that of other contents")
        bad = [key for key, x in tensors.items() if not (key.endswith(DRIFT) or x.itemsize == 1 or x.isfinite().all())]
        expect(not bad, name, "finite numbers", f"NaN or inf in {bad[:1]}")
        try:
            # Counters may be younger than the file, but for the first.
            stamp, written_by, progress = header["data"], header["written_by"], asdict(Progress()) | header["progress"]
            kinds = {key: type(value) for key, value in (stamp | progress).items() if key != "best"}
            fits = (
                kinds == _KINDS
                and isinstance(progress["best"], float | None)
                and 0 <= header["progress"]["step"] < 2**63
            )
            expect(fits and isinstance(written_by, dict), "fields", "those of a run", (stamp, progress, written_by))
            return cls(
                config=TrainConfig.from_dict(header["config"]),
                progress=asdict(Progress(**progress)),
                data=DataStamp(**stamp | {"class_names": tuple(stamp["class_names"])}),
                written_by=written_by,
                digest=header["digest"],
                **{part: {} for part in _PARTS} | nested(tensors),
            )
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: expected a header written by pyglow_fast, found {error!r} in it") from error

    def load_model(self, model: nn.Module, name: str, averaged: bool = False) -> None:
        """Copy the weights into ``model``, ``averaged`` ones where there are some; messages call the file ``name``."""
        weights = self.model | (self.ema if averaged else {})
        check_tensors(name, model.state_dict(), weights, any_dtype=True)  # the shipped ones have 16 bits
        model.load_state_dict(weights)


def versions() -> dict[str, str]:
    """Look up the versions of the package and of torch."""
    return {"pyglow_fast": info.version_of("pyglow-fast"), "torch": torch.__version__}


def check_tensors(
    name: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], any_dtype: bool = False
) -> None:
    """Refuse tensors of other names, shapes or dtypes than those of ``wanted``; what drift control keeps may differ."""
    here, there = (
        {key: key.endswith(DRIFT) or (value.shape, any_dtype or value.dtype) for key, value in state.items()}
        for state in (wanted, found)
    )
    differ = sorted(key for key in here | there if here.get(key) != there.get(key))
    fit = "tensors that fit its own configuration"
    expect(not differ, name, fit, f"{len(differ)} that differ, the first {differ[0]!r}" if differ else "")


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Part names at their first dot: {"ema.prior.mean": x} -> {"ema": {"prior.mean": x}}."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts
