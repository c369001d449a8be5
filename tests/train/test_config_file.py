"""Configurations as files: there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig
from pyglow_fast.train import TrainConfig, read_config, to_toml

CONFIG = TrainConfig(
    data=DataConfig('folder:a "quoted" \\ path', size=16, gray=True, n_bits=5, split_by="folder", held_out=0.2),
    model=GlowConfig(image_shape=(1, 16, 16), n_levels=2, n_classes=3),
    class_conditional=True,
    clip_norm=None,
    max_steps=None,
    max_minutes=1.5,
    ema_decay=None,
    lr=1e-05,
)


@pytest.mark.parametrize(
    "config",
    [CONFIG, TrainConfig(), TrainConfig(memory="4GB"), TrainConfig(memory=2**63 - 1)],
    ids=["changed", "default", "bytes", "most bytes"],
)
def test_toml_holds_every_field(config: TrainConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert TrainConfig.from_dict(read_config(path)) == config
    assert to_toml(TrainConfig.from_dict(read_config(path))) == path.read_text()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("x.toml", f"memory = {value}") for value in ('"4GB"', "'4 GB'", "4_000_000_000", "4e9", '"4000000000"')),
        *(("x.yaml", f"memory: {value}") for value in ("4GB", "4 GB", "4000000000", "4e9", "'4000000000'")),
        *(("x.json", f'{{"memory": {value}}}') for value in ('"4GB"', "4000000000", "4e9")),
    ],
)
def test_memory_in_bytes(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert TrainConfig.from_dict(read_config(tmp_path / name)) == TrainConfig(memory=4_000_000_000)
    assert 'memory = "4 GB"' in to_toml(TrainConfig.from_dict(read_config(tmp_path / name))).splitlines()


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(CONFIG.to_dict()))
    (tmp_path / "x.json").write_text(json.dumps(CONFIG.to_dict()))
    for name in ("x.yaml", "x.json"):
        assert TrainConfig.from_dict(read_config(tmp_path / name)) == CONFIG


@pytest.mark.parametrize("suffix", [".toml", ".json", ".yaml"])
def test_what_is_nested_too_deeply_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    lists = "[" * 20_000 + "]" * 20_000
    path.write_text({".toml": f"x = {lists}", ".json": f'{{"x": {lists}}}', ".yaml": f"x: {lists}"}[suffix])
    with pytest.raises(
        ValueError, match=r"^.*/x\.\w+: expected tables of settings, found deeper ones than can be read$"
    ):
        read_config(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.yaml", "data: &a\n  x: *a\n", "x.yaml: x: expected a value, or a list of them, found a table"),
        ("x.yaml", "data: &a [*a]\n", "x.yaml: data: expected a value, or a list of them, found a list in a list"),
        ("x.toml", "[data.size]\nx = 1", "x.toml: size: expected a value, or a list of them, found a table"),
        ("x.json", '{"lr": [{"a": 1}]}', "x.json: lr: expected a value, or a list of them, found a table in a list"),
        ("x.toml", "a\x1b[31m = 1", "x.toml: expected a configuration as TOML, found "),
        ("x\n.toml", "a =", r"x\n.toml: expected a configuration as TOML, found "),
    ],
)
def test_what_is_no_table_of_values(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="expected") as caught:
        read_config(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_none_is_null_only_where_null_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('clip_norm = "none"\noptimizer = "none"\n')
    assert read_config(path) == {"clip_norm": None, "optimizer": "none"}


def test_numbers_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-3\nema_decay: 9.99E-1\nseed: 3\nclip_norm: .5e1\nmodel: {scale_eps: -1E-2}\n")
    expected = {"lr": 1e-3, "ema_decay": 0.999, "seed": 3, "clip_norm": 5.0, "model": {"scale_eps": -0.01}}
    assert read_config(path) == expected
    assert isinstance(read_config(path)["seed"], int)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.ini", "", r"config: expected a file ending in one of .toml, .yaml, .yml, .json, found '.*x.ini'"),
        ("x.toml", "lr = ", r"x.toml: expected a configuration as TOML, found .*end of document"),
        ("x.toml", "lr = 1\nlr = 2", r"x.toml: expected a configuration as TOML, found .*"),
        ("x.yaml", "a: [", r"x.yaml: expected a configuration as YAML, found .*"),
        ("x.yaml", "!!python/object/apply:os.getcwd []", r"x.yaml: expected a configuration as YAML, found .*"),
        ("x.yaml", "- 1", r"x.yaml: expected tables of settings, found list"),
        ("x.json", "{", r"x.json: expected a configuration as JSON, found .*"),
        ("x.json", "3", r"x.json: expected tables of settings, found int"),
    ],
)
def test_refusals(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / name)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"expected a configuration as TOML, found .*utf-8"):
        read_config(tmp_path / "x.toml")
    with pytest.raises(ValueError, match=r"config: expected an existing file, found '.*none.toml'"):
        read_config(tmp_path / "none.toml")
