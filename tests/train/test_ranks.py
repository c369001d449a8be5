"""Several processes: weights that differ, and what torchrun does not set. The contract has what a run of theirs is."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import ranks

from pyglow_fast.train import open_ranks


@pytest.mark.full
def test_weights_that_differ_are_found_on_all_ranks(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """
import torch
from pyglow_fast.train import RankError, open_ranks
with open_ranks() as ranks:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).double())
    ranks.check_same(model)
    with torch.no_grad():
        model[1].bias[1] = torch.nextafter(model[1].bias[1], model[1].bias[1] + ranks.rank)
    try:
        ranks.check_same(model)
    except RankError as error:
        print(error)
"""
    )
    with ranks(tmp_path, *[[str(program)]] * 2) as processes:
        for process in processes:
            output, _ = process.ended()
            assert output.endswith("the same on all 2 ranks, found 1 parameters that differ, the first 1.bias\n")


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("LOCAL_RANK", "1.5"), ("MASTER_PORT", "abc")])
def test_what_torchrun_does_not_set_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}
    for key, text in (given | {name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(ValueError, match=f"^{name}: expected a value that torchrun sets, found {value}$"):
        open_ranks()
