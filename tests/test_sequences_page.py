"""The Python in docs/sequences.md runs, in order, on a decoder of coqui's interface."""

from __future__ import annotations

from typing import Any

import torch
from support.glow_tts_cases import TextDecoder
from support.pages import blocks, page


def test_the_code_runs() -> None:
    decoder = TextDecoder(4, 6, 2, kernel=3, rate=1, layers=2)
    names: dict[str, Any] = {"decoder": decoder}
    for block in blocks(page("docs/sequences.md")):
        if block.language == "python":
            exec(block.code, names)
    assert torch.allclose(names["back"], names["x"], atol=1e-3)
    assert names["mel"].shape == (4, 80, 50)
    assert len(names["report"].replaced) == 6
