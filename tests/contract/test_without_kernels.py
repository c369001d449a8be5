"""Without a compiler the package gives the same gradients and samples, on the reference in plain torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("gradients", "gradients_of_own_nets", "gradients_with_torch", "inverse_and_samples")


@pytest.mark.full
def test_the_contract_holds_on_the_reference() -> None:
    """Whoever has no compiler gets the same numbers, slower."""
    paths = [str(HERE / f"test_{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    environment = {**os.environ, "PYGLOW_FORCE_REFERENCE": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert " passed" in found.stdout
