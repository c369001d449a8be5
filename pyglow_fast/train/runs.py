"""Starts runs and resumes them: all that is refused is refused here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyglow_fast._errors import expect
from pyglow_fast.data import Images, load_data
from pyglow_fast.train.config import LIMITS, TrainConfig
from pyglow_fast.train.loop import Run
from pyglow_fast.train.machine import versions
from pyglow_fast.train.ranks import Ranks
from pyglow_fast.train.run_folder import RunFolder
from pyglow_fast.train.state import TrainState


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
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    return Run(state, folder, resumed=False, check=lambda: folder.check_new(overwrite), notes=[])


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
    listed, checkpoint = folder.saved(), folder.load()
    # The file may say more than the checkpoint: what was changed by hand, or by a resume that saved nothing yet.
    written = folder.read_config()
    config = written.adjusted(**changes)
    if data_name is not None and data_name != config.data.name:
        same_source = data_name.partition(":")[0] == config.data.name.partition(":")[0]
        expect(same_source, "data", f"{config.data.name!r}, as the run was started with", repr(data_name))
        config = replace(config, data=replace(config.data, name=data_name))
    state = TrainState(config, load_data(config.data) if data is None else data, ranks)
    state.restore(checkpoint, str(folder.of_step(checkpoint.progress["step"])))
    progress = state.progress
    if config.eval_images != checkpoint.config.eval_images:  # scores of other images are not compared
        progress.best, progress.stale = None, 0
    for name, reached in zip(LIMITS, (progress.step, state.epoch, progress.seconds / 60), strict=True):
        value, unit = changes.get(name), name.removeprefix("max_")
        # The limit that the run had may be named again: whoever repeats a command gets the report once more.
        ahead = value is None or value > reached or value == getattr(written, name)
        expect(ahead, name, f"more than the {reached:.6g} {unit} done", value)

    def check() -> None:
        same = folder.saved() == listed
        expect(same, "out", "the run as it was when it was read", f"another state in {out!r} (resume again)")

    notes = [
        f"resumed with {name} = {now!r} (it was {was!r})"
        for name, (was, now) in checkpoint.config.changes(config).items()
    ]
    for name, now in versions().items():
        was, what = checkpoint.written_by.get(name, "unknown"), "code of pyglow_fast" if name == "code" else name
        if was != now:
            notes.append(f"resumed with another version: {what} {now} (it was {was}); results may differ in rounding")
    return Run(state, folder, resumed=True, check=check, notes=notes)
