"""Reads and writes files of tensors, without running code, and this package's own file of one model."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.models import Glow, GlowConfig

FORMAT = 1
_HEADER = "pyglow_fast_model"
_SAFETENSORS, _NUMPY = ".safetensors", ".npz"
_TORCH = (".pt", ".pth", ".pkl", ".tar", ".ckpt", ".bin")


def opened(source: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    """Return a mapping as it is, and read a path by :func:`read_tensors`."""
    return read_tensors(source) if isinstance(source, str | Path) else source


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
        content = torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text would advise to run the file's code
        found = "one that is damaged or holds other Python objects, which only its own code could make"
        mend = "where it comes from, torch.save(model.state_dict(), PATH) writes tensors alone"
        raise ValueError(
            f"{name}: expected a file of tensors that is read without running code, found {found}; {mend}"
        ) from error
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name}: expected a file of tensors that is read without running code, found {reason}"
        ) from error
    expect(isinstance(content, dict), name, "a dict of tensors", type(content).__name__)
    return dict(content)


def check_target(path: str | Path) -> Path:
    """Find where :func:`write_tensors` or :func:`save_glow` can write.

    Raises:
        ValueError: the folder is not there, or the suffix is not .safetensors, .npz or one of torch.save's.
    """
    path = Path(path)
    suffixes = (_SAFETENSORS, _NUMPY, *_TORCH)
    expect(path.suffix in suffixes, "out", f"a name ending in one of {', '.join(suffixes)}", repr(str(path)))
    expect(path.parent.is_dir(), "out", "a file in an existing folder", repr(str(path)))
    expect(not path.is_dir(), "out", "a file", f"a folder, {str(path)!r}")
    expect(os.access(path.parent, os.W_OK), "out", "a file in a folder that can be written", repr(str(path)))
    return path


def write_tensors(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors or arrays, whole or not at all; torch.save's files may also hold dicts around them.

    Raises:
        ValueError: see :func:`check_target`; a dict within the dict where the format has none.
    """
    path = check_target(path)
    temporary = path.with_name(path.name + ".partial")
    if path.suffix in (_SAFETENSORS, _NUMPY):
        flat = all(isinstance(value, Tensor | np.ndarray) for value in content.values())
        expect(flat, "out", "a torch.save file for what is not tensors alone", repr(str(path)))
    try:
        if path.suffix == _SAFETENSORS:
            save_file({name: torch.as_tensor(value).contiguous() for name, value in content.items()}, temporary)
        elif path.suffix == _NUMPY:
            with temporary.open("wb") as file:
                np.savez(file, **{name: np.asarray(value) for name, value in content.items()})  # type: ignore[arg-type]
        else:
            torch.save(dict(content), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_glow(model: Glow, path: str | Path) -> None:
    """Write a model to a safetensors file; its header's ``pyglow_fast_model`` is the GlowConfig as JSON.

    Raises:
        ValueError: a frozen model; a path that does not end in .safetensors or whose folder is not there.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    expect(model.memory != "frozen", "model", "one that is not frozen", "a frozen one")
    path = check_target(path)
    expect(path.suffix == _SAFETENSORS, "out", "a name ending in .safetensors", repr(str(path)))
    header = {"format": FORMAT, "config": model.config.to_dict()}
    state = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("_extra_state")  # the state of training's drift control, which begins anew
    }
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(state, temporary, {_HEADER: json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    expect(path.is_file(), name, "a file", "a folder" if path.is_dir() else "nothing there")
    try:
        with safe_open(name, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(_HEADER)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{name}: expected a complete safetensors file, found {error}") from error
    expect(text is not None, name, "a model of pyglow_fast", "another safetensors file")
    try:
        try:
            header = json.loads(str(text))
        except (ValueError, RecursionError) as error:  # no JSON, a number of too many digits, or nested too deeply
            raise TypeError(f"{type(error).__name__}: {error}") from error
        found = header["format"]
        expect(found == FORMAT, name, f"format {FORMAT} (another version of pyglow_fast wrote it)", found)
        config = GlowConfig.from_dict(header["config"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{name}: expected a header written by pyglow_fast, found {error!r} in it") from error
    with torch.random.fork_rng(devices=[]):
        model = Glow(config, **options)
    if any(tensor.dtype == torch.float64 for tensor in state.values()):
        model = model.double()
    _check_state(model.state_dict(), state, name)
    model.load_state_dict(state)
    return model.to(device).eval()


def _check_state(wanted: Mapping[str, Any], state: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights that are not the model's, by the first difference."""
    expected = {key for key in wanted if not key.endswith("_extra_state")}
    for key in sorted(expected - set(state)):
        expect(False, name, f"a tensor {key!r}", "none")
    for key in sorted(set(state) - expected):
        expect(False, name, "weights that fit its own configuration", f"an unknown tensor {key!r}")
    for key, tensor in state.items():
        same = tensor.shape == wanted[key].shape
        expect(same, name, f"{key} of shape {tuple(wanted[key].shape)}", f"shape {tuple(tensor.shape)}")
        finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        expect(finite, name, f"{key} of finite numbers", "NaN or inf")
