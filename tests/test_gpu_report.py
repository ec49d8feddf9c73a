"""``make gpu-report`` where there is no GPU, and the parts of it that need none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_changes_nothing() -> None:
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.iterdir()) if results.exists() else []
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    assert before == (sorted(results.iterdir()) if results.exists() else [])


def test_tables_and_chart(tmp_path: Path) -> None:
    import gpu_report

    def result(implementation: str, ms: float, memory: float) -> gpu_report.Result:
        return gpu_report.Result(
            "conv_lstm2d", "training", "bf16", "lip24", implementation, ms, ms, ms, memory, 0.5, 0.25
        )

    results = [result("eager", 4.0, 100.0), result("compile", 3.0, 80.0), result("triton, channels last", 1.5, 60.0)]
    results.append(result("triton, channels last, recompute", 2.0, 30.0))
    text = gpu_report.tables(results)
    assert (
        "| lip24 | 1.500 | triton, channels last | 3.000 | compile | 2.00 | 50% | 25% | 0.60, 0.30 recompute |" in text
    )
    assert "| geometric mean | | | | | 2.00 |" in text
    gpu_report.chart(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_every_planned_shape_exists() -> None:
    import gpu_report

    plan = gpu_report.plan()
    assert {shape.name for _, shape, *_ in plan} == {shape.name for shape in gpu_report.GPU_SHAPES}
    assert plan[0][1].name == "lip24"
