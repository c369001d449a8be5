"""TrainConfig: files there and back, refusals, and what a resumed run may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig
from pyglow_fast.train import TrainConfig, read_config, to_toml

CONFIG = TrainConfig(
    data=DataConfig('folder:a "quoted" \\ path', size=16, gray=True, n_bits=5, split_by="folder", held_out=0.2),
    model=GlowConfig(image_shape=(1, 16, 16), n_levels=2, n_classes=3, classify=3),
    class_conditional=True,
    class_weight=0.01,
    clip_norm=None,
    max_steps=None,
    max_minutes=1.5,
    ema_decay=None,
    lr=1e-05,
)
WRITERS: dict[str, Callable[[TrainConfig], str]] = {
    "x.toml": to_toml,
    "x.json": lambda config: json.dumps(config.to_dict()),
    "x.yaml": lambda config: yaml.safe_dump(config.to_dict()),
}


@pytest.mark.parametrize("config", [CONFIG, TrainConfig(), TrainConfig(memory=2**63 - 1)], ids=["a", "b", "c"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_holds_every_field(config: TrainConfig, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(WRITERS[name](config))
    assert TrainConfig.from_dict(read_config(tmp_path / name)) == config


def test_values_in_files(tmp_path: Path) -> None:
    """1e-3 is a number in YAML, and "none" is null only where null may be."""
    (tmp_path / "x.yaml").write_text(
        "lr: 1e-3\nema_decay: 9.99E-1\nseed: 3\nclip_norm: .5e1\nmodel: {scale_eps: -1E-2}"
    )
    expected = {"lr": 1e-3, "ema_decay": 0.999, "seed": 3, "clip_norm": 5.0, "model": {"scale_eps": -0.01}}
    assert read_config(tmp_path / "x.yaml") == expected
    (tmp_path / "x.toml").write_text('clip_norm = "none"\noptimizer = "none"\n')
    assert read_config(tmp_path / "x.toml") == {"clip_norm": None, "optimizer": "none"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.ini", "", r"config: expected a file ending in one of .toml, .yaml, .yml, .json, found '.*x.ini'"),
        ("x.toml", "\xff", r"x.toml: expected a configuration as TOML, found .*utf-8"),
        ("x.yaml", "!!python/object/apply:os.getcwd []", r"x.yaml: expected a configuration as YAML, found .*"),
        ("x.yaml", "- 1", r"x.yaml: expected tables of settings, found list"),
        ("x.json", '{"size": 3}', r"config: expected known keys, found size"),
        ("x.json", '{"data": [3]}', r"data: expected a mapping, found list"),
        ("x.yaml", "lr: &a [*a]", r"lr: expected a positive number, found \[\[\.\.\.\]\]"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.from_dict(read_config(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1
    assert "\x1b" not in str(caught.value)


def test_what_a_resumed_run_may_change(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config(lr=0.5)
    longer = config.adjusted(max_steps=100, lr=0.5, log_every=7, memory="1.5 GiB")
    changes: dict[str, Any] = {"max_steps": (100, 12), "log_every": (7, 2)}
    assert {name: value for name, value in longer.changes(config).items() if name != "memory"} == changes
    assert longer.adjusted(log_every=8).memory == 1_610_612_736
    by_epochs = longer.adjusted(max_epochs=5)
    assert (by_epochs.max_steps, by_epochs.max_epochs, by_epochs.max_minutes) == (None, 5, None)
    both = by_epochs.adjusted(max_steps=7, max_minutes=2.5)
    assert (both.max_steps, both.max_epochs, both.max_minutes) == (7, None, 2.5)
    assert both.adjusted(save_every=1).max_steps == 7
    for given, message in (
        ({"lr": 0.1}, "lr: expected 0.5, as the run was started with, found 0.1"),
        ({"speed": 1}, "speed: expected a setting, found an unknown name"),
        ({"memory": "4XB"}, "memory: expected one of .*, found '4XB'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            config.adjusted(**given)
