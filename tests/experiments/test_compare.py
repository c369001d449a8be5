"""What is said of runs that do not compare, or may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pyglow_fast.experiments import caveat
from pyglow_fast.studio import OpenRun

SAME, OTHERS = "the images are the same", "bits/dim do not compare, since the runs have other images: shown emoji-small"


@pytest.mark.parametrize(
    ("changes", "fingerprint", "said"),
    [
        ({}, "", SAME),
        ({"flip": False}, "x", SAME),
        ({}, "x", OTHERS),
        ({"n_bits": 3}, "x", OTHERS),
        ({"held_out": 0.2}, "", "other images"),
    ],
)
def test_what_makes_figures_differ(changes: dict[str, Any], fingerprint: str, said: str) -> None:
    """Images, by their fingerprint, which knows of the flip too; and the split."""
    run = OpenRun.open("shown", device="cpu")
    config, stamp = run.checkpoint.config, run.checkpoint.data
    config = replace(config, data=replace(config.data, **changes))
    stamp = replace(stamp, fingerprint=fingerprint or stamp.fingerprint)
    assert caveat([run, replace(run, checkpoint=replace(run.checkpoint, config=config, data=stamp))]).startswith(said)
