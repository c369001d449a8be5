"""Starts runs and resumes them: all that is refused is refused here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.data import Images, load_data
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import LIMITS, TrainConfig
from pyglow_fast.train.config_file import to_toml
from pyglow_fast.train.loop import Run
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.run_folder import RunFolder
from pyglow_fast.train.state import TrainState
from pyglow_fast.train.versions import versions


def start(
    config: TrainConfig, out: str, overwrite: bool = False, data: Images | None = None, ranks: Ranks | None = None
) -> Run:
    """Make a new run, ready to execute.

    Args:
        config: the settings of the run.
        out: its folder; must be new or empty, or hold a run if ``overwrite``.
        overwrite: replace a run that is there (when the new one executes).
        data: the images that ``config.data`` names, if they are loaded already; or images of your own, see ImageSet and
            from_dataset.
        ranks: the processes that train together, see open_ranks; each of them makes the same run.

    Raises:
        ValueError: anything that does not fit; nothing has been written then.
        MissingExtraError: a library is not installed.
    """
    folder = RunFolder(out)
    folder.check_new(overwrite)
    _check_text(config)
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    return Run(state, folder, resumed=False, check=lambda: folder.check_new(overwrite))


def resume(
    out: str,
    data_name: str | None = None,
    data: Images | None = None,
    ranks: Ranks | None = None,
    **changes: Any,
) -> Run:
    """Make the run in ``out`` ready to go on from its last checkpoint, on any number of ranks.

    Args:
        out: its folder.
        data_name: where the images are now, if the folder has moved; they must be the same images.
        data: the images, if they are loaded already or are your own.
        ranks: as for :func:`start`.
        changes: new values for the fields of TrainConfig that may change (ADJUSTABLE). A limit among
            them replaces all former limits.

    Raises:
        ValueError: no run, no checkpoint, a change that is not allowed, a new limit that the run has already reached,
            other images; nothing has been written then.
    """
    folder = RunFolder(out)
    mark = folder.mark()
    checkpoint = folder.load()
    # The file may say more than the checkpoint: what was changed by hand, or by a resume that saved nothing yet.
    written = folder.read_config()
    config = written.adjusted(**changes)
    if data_name is not None and data_name != config.data.name:
        same_source = data_name.partition(":")[0] == config.data.name.partition(":")[0]
        expect(same_source, "data", f"{config.data.name!r}, as the run was started with", repr(data_name))
        config = replace(config, data=replace(config.data, name=data_name))
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    state.restore(checkpoint, str(folder.of_step(checkpoint.progress["step"])))
    if config.eval_images != checkpoint.config.eval_images:  # scores of other images are not compared
        state.progress.best, state.progress.stale = None, 0
    done = _done(state)
    for name in LIMITS:
        value, (reached, text) = changes.get(name), done[name]
        # The limit that the run had may be named again: whoever repeats a command gets the report once more.
        ahead = value is None or value > reached or value == getattr(written, name)
        expect(ahead, name, f"more than the {text} done", value)
    notes = _differences(checkpoint, config)
    return Run(state, folder, resumed=True, check=lambda: folder.check_unchanged(mark), notes=notes)


def _check_text(config: TrainConfig) -> None:
    """Refuse, before a former run is removed, what could not be written to config.toml."""
    try:
        to_toml(config).encode()
    except UnicodeEncodeError:
        found = ascii(config.data.name)
        raise ValueError(f"data: expected a path that is text in UTF-8, found {found}") from None


def _differences(checkpoint: Checkpoint, config: TrainConfig) -> tuple[str, ...]:
    """What is not as it was when the checkpoint was written, in lines."""
    lines = [
        f"resumed with {name} = {now!r} (it was {was!r})"
        for name, (was, now) in checkpoint.config.changes(config).items()
    ]
    for name, now in versions().items():
        was = checkpoint.written_by.get(name, "unknown")
        if was != now:
            what = "code of pyglow_fast" if name == "code" else name
            lines.append(f"resumed with another version: {what} {now} (it was {was}); results may differ in rounding")
    return tuple(lines)


def _done(state: TrainState) -> dict[str, tuple[float, str]]:
    """How far a run is by each of its limits, as a number and in words."""
    step, epoch, minutes = state.progress.step, state.epoch, state.progress.seconds / 60
    return {
        "max_steps": (step, f"{step} steps"),
        "max_epochs": (epoch, f"{epoch} epochs"),
        "max_minutes": (minutes, f"{minutes:.3g} minutes"),
    }
