"""What the tests of adapters share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from pyglow_fast import functional


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What our executor is called with besides weights."""
    calls: list[dict[str, Any]] = []
    own = functional.net_chain

    def noting(x: Tensor, weights: Any, biases: Any, spec: Any, **options: Any) -> Tensor:
        calls.append({"x": x, "spec": spec, **options})
        return own(x, weights, biases, spec, **options)

    monkeypatch.setattr(functional, "net_chain", noting)
    return calls
