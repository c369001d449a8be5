"""Event files, read back by TensorBoard itself."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyglow_fast.data import MissingExtraError
from pyglow_fast.train.board import Board


def events(folder: Path) -> Any:
    """Of all files in the folder."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value), as TensorBoard shows them."""
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_scalars_are_read_back(tmp_path: Path) -> None:
    with Board(tmp_path / "new" / "board") as board:
        board.scalars(1, {"train/bpd": 4.5, "lr": 1e-3, "held_out/bpd": None})
        board.scalars(2, {"train/bpd": 4.25, "lr": 2e-3, "memory_mb": 12, "held_out/bpd": math.nan})
    folder = tmp_path / "new" / "board"
    assert curve(folder, "train/bpd") == [(1, 4.5), (2, 4.25)]
    assert [value for _, value in curve(folder, "lr")] == pytest.approx([1e-3, 2e-3])
    assert curve(folder, "memory_mb") == [(2, 12.0)]
    (point,) = curve(folder, "held_out/bpd")
    assert point[0] == 2
    assert math.isnan(point[1])


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_read_back(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    with Board(tmp_path) as board:
        board.image(3, "samples", pixels)
    (event,) = events(tmp_path).Images("samples")
    picture = Image.open(io.BytesIO(event.encoded_image_string)).convert("L" if channels == 1 else "RGB")
    assert event.step == 3
    assert torch.equal(torch.tensor(list(picture.tobytes())).reshape(5, 7, channels).permute(2, 0, 1), pixels)


def test_a_resumed_run_takes_the_place_of_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    with Board(tmp_path) as board:
        for step in range(6):
            board.scalars(step, {"bpd": float(step)})
    with Board(tmp_path, purge_step=4) as board:
        for step in range(4, 8):
            board.scalars(step, {"bpd": 10.0 + step})
    assert curve(tmp_path, "bpd") == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 14.0),
        (5, 15.0),
        (6, 16.0),
        (7, 17.0),
    ]


def test_what_is_flushed_is_there_before_the_end(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.scalars(1, {"bpd": 2.0})
    board.flush()
    assert curve(tmp_path, "bpd") == [(1, 2.0)]
    board.close()


def test_without_a_folder_nothing_is_written_or_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    with Board(None) as board:
        board.scalars(1, {"bpd": 2.0})
        board.image(1, "samples", torch.zeros(1, 2, 2, dtype=torch.uint8))
        board.flush()
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r'tensorboard is needed .* pip install "pyglow-fast\[tensorboard\]"'):
        Board(tmp_path / "board")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_no_picture_is_refused(tmp_path: Path, folder: bool) -> None:
    with Board(tmp_path if folder else None) as board:
        for pixels in (torch.zeros(3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, 2).byte()):
            with pytest.raises(ValueError, match="pixels: expected uint8, shape"):
                board.image(1, "samples", pixels)


def test_a_step_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purge_step: expected None or a step, 0 or more, found -1"):
        Board(tmp_path / "board", purge_step=-1)
    assert list(tmp_path.iterdir()) == []
