"""``pyglow-fast convert``: every format to ours and back, runs, and wrong calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pyglow_fast as pgf
from pyglow_fast.app.cli import main
from pyglow_fast.interop import convert
from pyglow_fast.train import RunFolder, load_model

SUFFIX = {"openai": ".npz", "rosinality": ".pt", "chaiyujin": ".pkl", "y0ast": ".pt", "pyglow": ".safetensors"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model that every format has."""
    monkeypatch.chdir(tmp_path)
    model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=1, hidden=4, permutation="invconv_plain")
    model.initialize(torch.rand(8, 3, 8, 8) - 0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "splits" not in name:  # what rosinality pads there with ones
                parameter.add_(0.1 * torch.randn_like(parameter))
    convert.save_glow(model, "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["openai", "rosinality", "chaiyujin", "y0ast"])
def test_there_and_back(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, size = f"theirs{SUFFIX[name]}", ["--image-size", "8"] if name in ("openai", "rosinality") else []
    assert main(["convert", "pyglow", "model.safetensors", out, "--to", name]) == 0
    assert main(["convert", name, out, "again.safetensors", *size]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"pyglow -> {name}: 3x8x8, L 2, K 1, hidden 4, affine, invconv_plain: {out}"
    assert lines[1].startswith(f"{name} -> pyglow: 3x8x8, L 2, K 1, hidden ")
    x = torch.rand(2, 3, 8, 8) - 0.5
    with torch.no_grad():
        found, expected = (convert.load_glow(f).log_prob(x) for f in ("again.safetensors", "model.safetensors"))
    assert torch.allclose(found, expected, rtol=1e-4)


def test_what_no_file_can_be(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A path that is too long, a link that leads nowhere, and TorchScript, of which torch would advise to run it."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), "script.pt")
    Path("link.safetensors").symlink_to("nowhere")
    for out in (f"{'a' * 245}.safetensors", "/".join(["b" * 200] * 30) + ".safetensors", "link.safetensors"):
        assert main(["convert", "pyglow", "model.safetensors", out]) == 2
        assert main(["train", "digits", "--out", out, "--max-steps", "1"]) == 2
        assert capsys.readouterr().err.count("error: out: expected ") == 2
    assert main(["convert", "y0ast", "script.pt", "a.safetensors"]) == 2
    assert "weights_only" not in (err := capsys.readouterr().err)
    assert err.startswith("error: script.pt: expected a file of tensors that is read without running code, found one")


@pytest.mark.parametrize("last", [[], ["--last"]])
def test_a_run(trained: Path, tmp_path: Path, last: list[str]) -> None:
    out = tmp_path / "digits.safetensors"
    assert main(["convert", "pyglow", str(trained), str(out), *last]) == 0
    expected = load_model(RunFolder(trained).load(not last), "run").state_dict()
    found = convert.load_glow(out).state_dict()
    assert all(torch.equal(found[k], v) for k, v in expected.items() if not k.endswith("_extra_state"))
    assert main(["convert", "pyglow", str(trained), str(tmp_path / "a.pt"), "--to", "y0ast"]) == 0
