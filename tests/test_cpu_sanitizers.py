"""The CPU kernel suite once more, on a build that checks itself: AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_convlstm import _cpu

ROOT = Path(__file__).resolve().parents[1]


def runtime(name: str) -> str | None:
    """Path of one of the compiler's shared libraries."""
    if shutil.which("g++") is None:
        return None
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if Path(path).is_absolute() else None


def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    # libstdc++ too: the interceptor of exceptions has to find it when the process begins.
    libraries = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so.6")]
    if None in libraries:
        pytest.skip("g++ with libasan and libubsan is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    # The narrow and the widest code: what lies between differs in a few wrappers.
    variables = {
        "FUSED_CONVLSTM_SANITIZE": "address,undefined",
        "FUSED_CONVLSTM_CUDA": "0",
        "FUSED_CONVLSTM_INSTRUCTION_SETS": ",".join(set(_cpu.detected_instruction_sets()[-1:]) - {"portable"}),
    }
    subprocess.run(build, cwd=ROOT, check=True, env=environment | variables)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
         *(str(path) for path in sorted((ROOT / "tests").glob("test_cpu_*.py")) if path.name != Path(__file__).name),
         "-k", "training or (portable and not float64)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {
            "PYTHONPATH": os.pathsep.join([str(tmp_path / "lib"), str(ROOT / "tests")]),
            "LD_PRELOAD": " ".join(map(str, libraries)),
            # Python and torch keep memory until the end on purpose.
            "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-20_000:]
    assert " passed" in result.stdout
