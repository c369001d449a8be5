"""The settings of torch that nets in float32 or TF32 need: held while they run, put back when the last has left."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Command
from support.tf32 import SETTINGS, in_tf32

from pyglow_fast import _float32
from pyglow_fast._float32 import CONVOLUTIONS, PRODUCTS
from pyglow_fast.nets.precision import in_precision

C = 12
by_setting = pytest.mark.parametrize("setting", SETTINGS)
Backends: Any = torch.backends


def now() -> dict[str, str]:
    """What CUDA is set to, by each of its settings, and what those around them say."""
    places = {"all": Backends, "cuda": Backends.cudnn, "matmul": Backends.cuda.matmul}
    places |= {"conv": Backends.cudnn.conv, "rnn": Backends.cudnn.rnn}
    return {name: place.fp32_precision for name, place in places.items()}


class TestSettings:
    @pytest.mark.parametrize("precision", ["fp32", "tf32"])
    @by_setting
    def test_all_compute_in_it_and_the_settings_are_as_they_were(self, setting: str, precision: str) -> None:
        x = torch.randn(2, C, 9)
        with in_tf32(setting):
            before = now()
            with in_precision(precision, x):
                assert {now()[name] for name in ("matmul", "conv", "rnn")} == {
                    "ieee" if precision == "fp32" else "tf32"
                }
                assert _float32.rounds(PRODUCTS, x) == _float32.rounds(CONVOLUTIONS, x) == (precision == "tf32")
            assert now() == before
            with pytest.raises(KeyError), in_precision(precision, x):
                raise KeyError
            assert now() == before

    def test_threads_do_not_leave_each_others_settings_behind(self) -> None:
        """The first to come is the first to go: what it found is not put back under the others, nor theirs kept."""
        x, seen = torch.randn(2, C, 9), []
        inside, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with in_precision("fp32", x):
                inside.set()
                leave.wait(10)
                seen.append(now()["conv"])

        with in_tf32():
            before = now()
            other = threading.Thread(target=hold)
            with in_precision("fp32", x):
                other.start()
                assert inside.wait(10)
            assert now()["conv"] == "ieee"
            leave.set()
            other.join()
            assert now() == before
        assert seen == ["ieee"]

    def test_full_precision_wins(self) -> None:
        x = torch.randn(2, C, 9)
        with in_tf32(), in_precision("fp32", x), in_precision("tf32", x):
            assert now()["conv"] == "ieee"

    @pytest.mark.parametrize(
        ("set_before", "outer"), [(["", "cudnn.conv."], ""), (["cudnn.", "cuda.matmul."], "cudnn."), ([], "")]
    )
    def test_what_followed_another_setting_still_does(
        self, set_before: list[str], outer: str, tmp_path: Path
    ) -> None:
        """In a process of its own: torch has no way back to a setting of convolutions that follows the others."""
        settings = "\n".join(f'torch.backends.{place}fp32_precision = "tf32"' for place in set_before)
        legacy = None if set_before else "torch.backends.cudnn.allow_tf32"  # which torch refuses once others are set
        program = f"""
import sys
import torch
from pyglow_fast import _float32

def now():
    cudnn = torch.backends.cudnn
    return [place.fp32_precision for place in (cudnn, torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]

{settings}
for precision in sys.argv[1:]:
    with _float32.computing_in(precision):
        assert set(now()) == {{precision}}, now()
print({legacy})
torch.backends.{outer}fp32_precision = "ieee"
print(now())
"""
        outputs = [Command(["-c", program, *held], tmp_path).communicate() for held in ([], ["ieee", "tf32", "ieee"])]
        assert outputs[0][0].endswith("]\n"), outputs[0]
        assert outputs[0] == outputs[1]
