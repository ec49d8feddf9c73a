"""Running a test file once more for each cell under Triton's interpreter, where kernels need no GPU.

Triton decides when it is imported, so this takes a process of its own. There the file is collected a second time, and
finds ``INTERPRETING`` true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_CELL = os.environ.get("FUSED_CONVLSTM_INTERPRETED_CELL", "")


def rerun_interpreted(file: str, cell: str) -> None:
    """Runs the tests of ``file`` for ``cell`` under the interpreter; fails with their output if one of them does."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--color=no", file]
    environment = os.environ | {
        "TRITON_INTERPRET": "1", "FUSED_CONVLSTM_INTERPRETED_CELL": cell, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    # Not in the source folder, where the package would be found without its compiled kernels.
    folder = Path(file).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"under the interpreter:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
