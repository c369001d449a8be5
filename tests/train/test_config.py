"""TrainConfig: files there and back, refusals, and what a resumed run may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("config", [CONFIG, TrainConfig(), TrainConfig(memory=2**63 - 1)], ids=["a", "b", "c"])
def test_a_file_holds_every_field(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(to_toml(config))
    assert TrainConfig.from_dict(read_config(tmp_path / "x.toml")) == config


def test_values_in_files(tmp_path: Path) -> None:
    """The text "none" is None only where None may be."""
    (tmp_path / "x.toml").write_text('clip_norm = "none"\noptimizer = "none"\n')
    assert read_config(tmp_path / "x.toml") == {"clip_norm": None, "optimizer": "none"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.ini", "", r"config: expected a file ending in .toml, found '.*x.ini'"),
        ("x.toml", "\xff", r"x.toml: expected a configuration as TOML, found .*utf-8"),
        ("x.toml", "lr: 1", r"x.toml: expected a configuration as TOML, found Expected '='"),
        ("x.toml", "size = 3", r"config: expected known keys, found size"),
        ("x.toml", "data = [3]", r"data: expected a mapping, found list"),
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
