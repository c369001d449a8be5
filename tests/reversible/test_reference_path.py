"""The same without the compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# One of each kind of what the kernels do; test_one_run_... is there to show that the choice is not empty.
CHOSEN = (
    "depth or exp or atan-scale_shift or additive or cond or 3d or everything or one_run or Seeded or ill_conditioned"
)


@pytest.mark.full
def test_gradients_and_drift_control_on_the_reference() -> None:
    files = [str(HERE / name) for name in ("test_gradients.py", "test_drift.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", CHOSEN, *files]
    environment = {**os.environ, "PYGLOW_FORCE_REFERENCE": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]
    assert int(found.stdout.rsplit("\n", 2)[-2].split(" passed")[0].split()[-1]) > 50, found.stdout[-300:]
