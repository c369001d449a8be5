"""Without a compiler the package gives the same gradients and samples, on the reference in plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.program import expect_passed

HERE = Path(__file__).parent
FILES = ("gradients", "gradients_of_own_nets", "gradients_with_torch", "inverse_and_samples")


@pytest.mark.full
def test_the_contract_holds_on_the_reference() -> None:
    """Whoever has no compiler gets the same numbers, slower."""
    expect_passed(*(str(HERE / f"test_{name}.py") for name in FILES), PYGLOW_FORCE_REFERENCE="1")
