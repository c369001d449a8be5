"""Interpolation, edits, temperatures, kept levels and depths, as a user runs them on small runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_layouts import picture
from support.latent_runs import EMOJI, train, write_emoji

from pyglow_fast import latents as tools
from pyglow_fast.cli import main
from pyglow_fast.data import emoji_tone_pairs, load_data, split
from pyglow_fast.models import Glow
from pyglow_fast.train import RunFolder, load_model
from pyglow_fast.train.metrics import read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with emoji and two runs on them, of two levels and of one, and a labelled run on digits."""
    root = tmp_path_factory.mktemp("latents")
    write_emoji(root / "emoji")
    for name, levels in (("two", "2"), ("one", "1")):
        train(f"emoji:{root / 'emoji'}", root / name, "--size", "16", "--n-levels", levels)
    train("digits", root / "digits", "--n-levels", "2", "--class-conditional")
    return root


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main(list(command)) == 0
    return capsys.readouterr().out


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def opened(place: Path) -> tuple[Glow, Any, torch.Tensor, torch.Tensor]:
    """Model, images, training and held-out indices of the run on emoji with two levels."""
    checkpoint = RunFolder(place / "two").load()
    data = load_data(checkpoint.config.data)
    return load_model(checkpoint, "two"), data, *split(data, None, checkpoint.config.seed)


@pytest.mark.parametrize("options", [[], ["--spherical", "--space", "latent"], ["--images", "0", "1", "--frames", "3"]])
@pytest.mark.parametrize("run", ["two", "digits"])
def test_interpolate(
    place: Path, run: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "digits" if run == "digits" else f"emoji:{place / 'emoji'}"
    out = tmp_path / "x.png"
    text = said(capsys, "interpolate", str(place / run), data, "--out", str(out), *options)
    found = re.search(
        r"^(\d+) pairs of .*ends off by at most (\S+) .*, (\d+) grey levels changed: .*x.png$", text, re.M
    )
    assert found is not None, text
    n_images = 180 if run == "digits" else len(opened(place)[3])
    assert int(found[1]) == (1 if "--images" in options else min(4, n_images // 2))
    assert float(found[2]) < 1e-4
    assert int(found[3]) == 0
    assert size(out)[0] > 64 * (5 if "--frames" in options else 10)


def test_ends_that_are_not_finite_are_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ruined(*args: Any) -> torch.Tensor:
        return tools.interpolate(*args).index_fill_(0, torch.tensor([1]), torch.nan)

    monkeypatch.setattr("pyglow_fast.cli.interpolate.interpolate", ruined)
    command = ["interpolate", str(place / "digits"), "digits", "--pairs", "3", "--frames", "2"]
    text = said(capsys, *command, "--out", str(tmp_path / "x.png"))
    assert "(2 images not finite, shown grey); ends off by at most nan (nan grey levels)" in text


@pytest.mark.parametrize("error", [RuntimeError("no: can't allocate memory, 8 bytes\nmore"), MemoryError()])
def test_too_many_samples_are_refused_in_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full(*args: Any, **options: Any) -> torch.Tensor:
        raise error

    monkeypatch.setattr("pyglow_fast.cli.temperatures.temperature_sweep", full)
    assert main(["temperatures", str(place / "digits"), "--out", str(tmp_path / "x.png")]) == 1
    why = f": {error}".split("\n")[0] if str(error) else ""
    assert capsys.readouterr().err == f"error: not enough memory{why}\n"


@pytest.mark.parametrize(("run", "space", "told"), [("digits", "noise", True), ("digits", "latent", False)])
def test_noise_that_does_not_hold_the_class_is_told(
    place: Path, run: str, space: str, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["manipulate", str(place / run), "digits", "--plus", "3", "--minus", "8", "--train-images", "4"]
    text = said(capsys, *command, "--space", space, "--out", str(tmp_path / "x.png"))
    assert ("note: the model has classes" in text) == told


def test_a_tone_of_a_run_with_classes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The true targets are looked at without their labels."""
    data, run, out = f"emoji:{place / 'emoji'}", tmp_path / "run", tmp_path / "x.png"
    train(data, run, "--size", "16", "--n-levels", "1", "--class-conditional")
    text = said(capsys, "manipulate", str(run), data, "--tone", "dark", "--out", str(out))
    assert "copy (no edit): " in text
    assert size(out)[0] > 0


@pytest.mark.parametrize("space", tools.SPACES)
def test_a_tone_is_scored_against_the_true_targets(
    place: Path, space: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures in the table and the file are those of the Python functions, on pairs found here."""
    data_name, out, scores = f"emoji:{place / 'emoji'}", tmp_path / "x.png", tmp_path / "x.csv"
    command = ["manipulate", str(place / "two"), data_name, "--tone", "dark", "--space", space, "--strengths", "0", "1"]
    text = said(capsys, *command, "--out", str(out), "--csv", str(scores), "--n", "1")
    model, data, _, held_out = opened(place)
    pairs = [pair for pair in emoji_tone_pairs(place / "emoji") if pair.tone == "dark"]
    assert len(pairs) == EMOJI
    test = set(held_out.tolist())
    x = (data.pixels.float() + 0.5) / data.n_bins - 0.5
    sides: dict[bool, list[list[int]]] = {True: [], False: []}
    for pair in pairs:
        assert (pair.base in test) == (pair.variant in test)
        sides[pair.base in test].append([pair.base, pair.variant])
    base, target = x[torch.tensor(sides[True])].unbind(1)
    known = x[torch.tensor(sides[False])].flatten(0, 1)
    with torch.no_grad():
        latents = tools.to_space(model, known, space)
        direction = [(z[1::2] - z[::2]).mean(0) for z in latents]
        edited = tools.manipulate(model, base, direction, [1.0], space=space)[:, 0]
    copied = ((base - target) ** 2).mean(dim=(1, 2, 3)).sqrt()
    moved = ((edited.clamp(-0.5, 0.5) - target) ** 2).mean(dim=(1, 2, 3)).sqrt()
    shift = (known[1::2] - known[::2]).mean(0)
    shifted = (((base + shift).clamp(-0.5, 0.5) - target) ** 2).mean(dim=(1, 2, 3)).sqrt()
    rows = {(row["edit"], row["strength"]): row for row in csv.DictReader(scores.open())}
    assert set(rows) == {("copy", ""), ("latents", "0"), ("latents", "1"), ("pixels", "0"), ("pixels", "1")}
    for key, values in ((("copy", ""), copied), (("latents", "1"), moved), (("pixels", "1"), shifted)):
        assert float(rows[key]["rmse"]) == pytest.approx(float(values.mean()), rel=1e-4)
        assert rows[key]["images"] == str(len(base))
    assert float(rows["latents", "0"]["rmse"]) == pytest.approx(float(copied.mean()), rel=1e-4)
    assert float(rows["latents", "1"]["gain"]) == pytest.approx(float((copied - moved).mean()), abs=1e-5)
    assert f"{float(copied.mean()):.4f}" in text
    assert f"mean of {len(sides[False])} training images minus mean of {len(sides[False])}" in text
    assert f"{float(moved.mean()):.4f}" in text


def test_classes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    command = ["manipulate", str(place / "two"), f"emoji:{place / 'emoji'}", "--out", str(out)]
    text = said(capsys, *command, "--plus", "Squares", "--minus", "Discs", "--levels", "1", "--n", "2")
    _, data, train_side, _ = opened(place)
    discs, squares = (int((data.labels[train_side] == label).sum()) for label in (0, 1))
    assert f"Squares minus Discs: mean of {squares} training images minus mean of {discs}" in text
    assert "level 1; 2 held-out images" in text
    rest = said(capsys, *command, "--plus", "Squares", "--minus", "rest", "--train-images", "3")
    assert "Squares minus rest: mean of 3 training images minus mean of 3" in rest


def test_classes_of_a_model_that_knows_them(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["manipulate", str(place / "digits"), "digits", "--plus", "3", "--minus", "rest"]
    text = said(capsys, *command, "--out", str(tmp_path / "x.png"), "--n", "3")
    assert "3 minus rest: mean of " in text
    assert size(tmp_path / "x.png")[1] > 3 * 64


def test_samples_that_are_not_finite_are_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(
        capsys, "temperatures", str(place / "two"), "--out", str(tmp_path / "x.png"), "--temperatures", "0", "1e38"
    )
    assert "not finite, shown grey: 8 at 1e+38" in text


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_levels(place: Path, temperature: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["levels", str(place / "two"), f"emoji:{place / 'emoji'}", "--temperature", temperature]
    text = said(capsys, *command, "--out", str(tmp_path / "x.png"), "--n", "3")
    found = dict(re.findall(r"^  (the deepest level \(1\)|all levels): ([\d.]+)", text, re.M))
    assert float(found["all levels"]) == 0.0
    assert float(found["the deepest level (1)"]) > 0.01
    model, data, _, held_out = opened(place)
    if temperature == "0":
        x = (data.pixels[held_out].float() + 0.5) / data.n_bins - 0.5
        every = said(capsys, *command, "--out", str(tmp_path / "x.png"), "--n", "99")
        kept = tools.keep_levels(model, x, [1])
        expected = ((kept.clamp(-0.5, 0.5) - x) ** 2).mean(dim=(1, 2, 3)).sqrt().mean()
        assert f"the deepest level (1): {float(expected):.4f}" in every


def test_chosen_levels(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["levels", str(place / "digits"), "digits", "--out", str(tmp_path / "x.png"), "--n", "2"]
    text = said(capsys, *command, "--keep", "0", "--keep", "1", "0")
    assert re.search(r"^  level 0: .*\n  all levels: 0.0000", text, re.M)


def test_depths(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The score of a run's report, that of its metrics if there is no report, and one made now if there is neither."""
    runs = []
    for name in ("two", "one", "one"):
        runs.append(Path(shutil.copytree(place / name, tmp_path / f"{name}{len(runs)}")))
    (runs[1] / "report.json").unlink()
    (runs[2] / "report.json").write_text("{")
    (runs[2] / "metrics.csv").unlink()
    command = ["depths", *map(str, runs), "--out", str(tmp_path / "x.png"), "--n", "3", "--columns", "2"]
    lines = said(capsys, *command).splitlines()
    report = json.loads((runs[0] / "report.json").read_text())["held_out"]
    assert "L = 2, K = 2, " in lines[0]
    assert f"{report['mean']:.3f} ± {report['standard_error']:.3f} bits/dim held out (the run's own" in lines[0]
    assert "L = 1, K = 2, " in lines[1]
    assert "(the run's own evaluation)" in lines[1]
    assert "(evaluated now, " in lines[2]
    score = re.compile(r"([\d.]+) ± ([\d.]+) bits/dim")
    assert score.findall(lines[1]) == score.findall(lines[2])
    assert size(tmp_path / "x.png")[1] > 6 * 64


def test_depths_of_the_best_checkpoints(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which are older than the report: it tells nothing of them."""
    runs = [place / name for name in ("two", "one")]
    lines = said(capsys, "depths", *map(str, runs), "--best", "--out", str(tmp_path / "x.png"), "--n", "1").splitlines()
    for run, line in zip(runs, lines, strict=False):
        step = RunFolder(run).load(best=True).progress["step"]
        assert step < json.loads((run / "report.json").read_text())["step"]
        (row,) = (row for row in read_metrics(run / "metrics.csv") if row["step"] == step)
        assert line.startswith(f"{run} at step {step}: ")
        assert f", {row['held_out_bpd']:.3f} ± {row['held_out_se']:.3f} bits/dim held out" in line


@pytest.mark.full
def test_an_attribute_of_celeba(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run was trained without labels; the attribute names them afterwards, on the same split."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(16)]
    for i, name in enumerate(names):
        values = np.random.default_rng(i).integers(0, 256, (22, 18, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / "img_align_celeba" / name)
    (folder / "list_eval_partition.txt").write_text("".join(f"{name} {2 * (i > 11)}\n" for i, name in enumerate(names)))
    rows = [f"{name} {1 if i % 3 == 0 else -1} 1\n" for i, name in enumerate(names)]
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling Young\n" + "".join(rows))
    data = f"celeba:{tmp_path}"
    train(data, tmp_path / "run", "--size", "16", "--n-levels", "1")
    command = ["manipulate", str(tmp_path / "run"), data, "--plus", "Smiling", "--minus", "rest"]
    text = said(capsys, *command, "--attribute", "Smiling", "--out", str(tmp_path / "x.png"))
    assert "mean of 4 training images minus mean of 8" in text
    assert "4 held-out images" in text
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "y.png")]) == 2
    assert "data: expected images with labels" in capsys.readouterr().err
    train(
        data,
        tmp_path / "conditional",
        "--size",
        "16",
        "--n-levels",
        "1",
        "--attribute",
        "Smiling",
        "--class-conditional",
    )
    command[1] = str(tmp_path / "conditional")
    said(capsys, *command, "--attribute", "Smiling", "--out", str(tmp_path / "x.png"))
    assert main([*command, "--attribute", "Young", "--out", str(tmp_path / "y.png")]) == 2
    message = "error: attribute: expected 'Smiling', which the model is conditioned on, found 'Young'\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "y.png").exists()


def test_rest_is_the_rest_also_of_a_class_of_this_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 18 training images of three classes are on one side or the other."""
    for name in ("a", "b", "rest"):
        for i in range(8):
            picture(tmp_path / "data" / name / f"{i}.png", i)
    data = f"folder:{tmp_path / 'data'}"
    train(data, tmp_path / "run", "--size", "16", "--n-levels", "1", "--held-out", "0.25")
    found = []
    for plus in ("a", "b", "rest"):
        command = ["manipulate", str(tmp_path / "run"), data, "--plus", plus, "--minus", "rest"]
        text = said(capsys, *command, "--out", str(tmp_path / "x.png"))
        assert f"{plus} minus rest" in text
        words = text.split("mean of ")
        found.append((int(words[1].split()[0]), int(words[2].split()[0].strip(",;"))))
    assert {with_it + without for with_it, without in found} == {18}
    assert sum(with_it for with_it, _ in found) == 18
