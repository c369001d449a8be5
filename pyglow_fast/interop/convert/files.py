"""Reads and writes files of tensors, without running code, and this package's own file of one model."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyglow_fast._core.errors import expect
from pyglow_fast._core.files import check_file, replacing
from pyglow_fast.models import Glow, GlowConfig

FORMAT = 1
_HEADER = "pyglow_fast_model"
_SAFETENSORS, _NUMPY = ".safetensors", ".npz"
_TORCH = (".pt", ".pth", ".pkl", ".tar", ".ckpt", ".bin")
_WRAPPERS = ("graph", "model", "state_dict", "model_state_dict", "net")
_AROUND_MODULES = re.compile(r"^(?:module\.|_orig_mod\.)+")  # prefixes of DataParallel and torch.compile


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a file by its suffix: .safetensors, .npz (no object arrays), else torch.save's, tensors only.

    Raises:
        ValueError: no such file, a damaged one, or one that would have to run code to be read.
    """
    path, name = Path(path), str(path)
    expect(path.is_file(), name, "a file", "a folder" if path.is_dir() else "nothing there")
    try:
        if path.suffix == _SAFETENSORS:
            return dict(load_file(name))
        if path.suffix == _NUMPY:
            with np.load(name, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        with warnings.catch_warnings(action="ignore"):  # of TorchScript
            content = torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise anything
        found = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in found:  # torch advises to run the file's code
            found = "one that is damaged or holds other Python objects, which only its own code could make"
            found += "; where it comes from, torch.save(model.state_dict(), PATH) writes tensors alone"
        expected = "a file of tensors that is read without running code"
        raise ValueError(f"{name}: expected {expected}, found {found}") from error
    expect(isinstance(content, dict), name, "a dict of tensors", type(content).__name__)
    return dict(content)


def check_target(path: str | Path) -> Path:
    """Find where :func:`write_tensors` or :func:`save_glow` can write.

    Raises:
        ValueError: the folder is not there, or the suffix is not .safetensors, .npz or one of torch.save's.
    """
    path, suffixes = Path(path), (_SAFETENSORS, _NUMPY, *_TORCH)
    expect(path.suffix in suffixes, "out", f"a name ending in one of {', '.join(suffixes)}", repr(str(path)))
    check_file("out", path)
    return path


def write_tensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors or arrays, whole or not at all; torch.save's files may also hold dicts around them.

    Raises:
        ValueError: see :func:`check_target`; a dict within the dict where the format has none.
    """
    path = check_target(path)
    flat = path.suffix in _TORCH or all(isinstance(value, Tensor | np.ndarray) for value in content.values())
    expect(flat, "out", "a torch.save file for what is not tensors alone", repr(str(path)))
    with replacing(path) as temporary:
        if path.suffix == _SAFETENSORS:
            save_file({name: torch.as_tensor(value).contiguous() for name, value in content.items()}, temporary)
        elif path.suffix == _NUMPY:
            with temporary.open("wb") as file:
                np.savez(file, **{name: np.asarray(value) for name, value in content.items()})  # type: ignore[arg-type]
        else:
            torch.save(dict(content), temporary)


def check_savable(model: Glow) -> None:
    """Refuse what is no Glow, and a frozen one."""
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    expect(model.memory != "frozen", "model", "one that is not frozen", "a frozen one")


def save_glow(model: Glow, path: str | Path) -> None:
    """Write a model to a safetensors file; its header's ``pyglow_fast_model`` is the GlowConfig as JSON.

    Raises:
        ValueError: a frozen model; a path that does not end in .safetensors or whose folder is not there.
    """
    check_savable(model)
    path = check_target(path)
    expect(path.suffix == _SAFETENSORS, "out", "a name ending in .safetensors", repr(str(path)))
    header = {"format": FORMAT, "config": model.config.to_dict()}
    state = _without_control(model.state_dict())
    with replacing(path) as temporary:
        own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        save_file(own, temporary, {_HEADER: json.dumps(header)})


def load_glow(path: str | Path, device: str | torch.device = "cpu", **options: Any) -> Glow:
    """Load the model of a file that :func:`save_glow` wrote, in evaluation mode.

    Args:
        path: of the file.
        device: where the model goes.
        **options: memory, precision, ...: see :class:`~pyglow_fast.Glow`.

    Raises:
        ValueError: no such file, another one, or weights that do not fit its configuration.
    """
    path, name = Path(path), str(path)
    expect(path.suffix == _SAFETENSORS, name, "a name ending in .safetensors", repr(path.suffix))
    reader = Reader(path)
    with safe_open(name, framework="pt") as file:
        text = (file.metadata() or {}).get(_HEADER)
    expect(text is not None, name, "a model of pyglow_fast", "another safetensors file")
    try:
        header = json.loads(str(text))
        config = GlowConfig.from_dict(header["config"]) if header["format"] == FORMAT else None
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # JSON may be nested too deeply
        raise ValueError(f"{name}: expected a header written by pyglow_fast, found {error!r} in it") from error
    expected = f"format {FORMAT} (another version of pyglow_fast wrote it)"
    expect(config is not None, name, expected, header["format"])
    with torch.random.fork_rng(devices=[]):
        model = Glow(config, **options)
    state = _without_control(model.state_dict())
    state = {key: reader.take(key, *tensor.shape) for key, tensor in state.items()}
    model.to(reader.finish()).load_state_dict(state)
    return model.to(device).eval()


def _without_control(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the state of training's drift control, which begins anew."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


class Reader:
    """Takes named tensors, each of the shape that it must have; what is missing, misshapen or left over is named.

    Dicts around the state dict (with a step, an optimizer, ...) are opened, arrays become tensors, the ``module.`` and
    ``_orig_mod.`` that DataParallel and torch.compile put in front of names go.

    Args:
        source: a state dict, or the path of its file.
    """

    def __init__(self, source: Mapping[str, Any] | str | Path) -> None:
        state: Mapping[str, Any] = read_tensors(source) if isinstance(source, str | Path) else source
        expect(isinstance(state, Mapping), "state", "a dict of tensors or arrays", type(state).__name__)
        while any(isinstance(value, Mapping) for value in state.values()):
            inner = next((key for key in _WRAPPERS if isinstance(state.get(key), Mapping)), "")
            expected = f"a state dict, or one within a dict under {', '.join(_WRAPPERS)}"
            expect(bool(inner), "state", expected, f"a dict with {sorted(map(str, state))}")
            state = state[inner]
        expect(len(state) > 0, "state", "tensors", "an empty dict")
        self.tensors: dict[str, Tensor] = {}
        for name, value in state.items():
            is_array = isinstance(value, Tensor | np.ndarray | np.generic)
            expect(is_array, str(name), "a tensor or an array", type(value).__name__)
            plain, tensor = _AROUND_MODULES.sub("", str(name), count=1), torch.as_tensor(value)
            expect(plain not in self.tensors, str(name), f"one tensor of the name {plain!r}", "two")
            dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
            found = f"{tensor.dtype}, {tensor.layout}, device {tensor.device}"
            expect(dense and not tensor.is_complex(), str(name), "a tensor of plain real numbers", found)
            self.tensors[plain] = tensor.detach().cpu()
        self._taken: set[str] = set()

    def has(self, prefix: str) -> bool:
        """Whether some name starts with ``prefix``."""
        return any(name.startswith(prefix) for name in self.tensors)

    def indices(self, prefix: str) -> list[int]:
        """List the numbers, 0, 1, ..., that follow ``prefix`` in the names."""
        found = (re.match(re.escape(prefix) + r"(\d+)[./]", name) for name in self.tensors)
        return sorted({int(match[1]) for match in found if match})

    def size(self, name: str, dim: int) -> int:
        """The size of a tensor along one dimension; one that is missing, or has not so many, is refused."""
        expect(name in self.tensors, name, "a tensor of that name", "none")
        tensor, least = self.tensors[name], dim + 1 if dim >= 0 else -dim
        expect(tensor.dim() >= least, name, f"at least {least} dimensions", f"shape {tuple(tensor.shape)}")
        return tensor.shape[dim]

    def take(self, name: str, *shape: int) -> Tensor:
        """Take a tensor of that shape, a floating one as float64; others, or NaN and inf, are refused."""
        expect(name in self.tensors, name, "a tensor of that name", "none")
        tensor = self.tensors[name]
        expect(tuple(tensor.shape) == shape, name, f"shape {shape}", f"shape {tuple(tensor.shape)}")
        expect(bool(tensor.isfinite().all()), name, "finite numbers", "NaN or inf")
        self._taken.add(name)
        return tensor.double() if tensor.is_floating_point() else tensor

    def finish(self, left_out: str = "$.") -> torch.dtype:
        """Refuse tensors that nobody took, but for names that begin with ``left_out`` (a regular expression).

        Returns:
            The dtype of the model: float64 if all numbers that were taken have it, else float32.
        """
        left = sorted(name for name in self.tensors if name not in self._taken and not re.match(left_out, name))
        expect(not left, left[0] if left else "", "no tensor of that name", f"{len(left)} that do not belong")
        found = {self.tensors[name].dtype for name in self._taken if self.tensors[name].is_floating_point()}
        return torch.float64 if found == {torch.float64} else torch.float32
