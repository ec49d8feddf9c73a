"""The report of the benchmarks, measured a second time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import report


def test_the_faster_run_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = report.Measurement("conv_lstm2d", "inference float32", "lip3", "fused", 10.0, 9.0, 11.0, 5, 1e9, 100.0)
    eager = replace(fused, implementation="eager", median_ms=15.0)
    report.write_report([fused, eager], tmp_path, "cpu")
    text = report.write_report(
        [replace(fused, median_ms=12.0), replace(eager, median_ms=14.0)], tmp_path, "cpu", again=True
    )
    assert "| lip3 | 10 | 14 (eager) | 1.40 | 10 | 100% |" in text
    kept = json.loads((tmp_path / "cpu.json").read_text())["measurements"]
    assert [(m["implementation"], m["median_ms"]) for m in kept] == [("fused", 10.0), ("eager", 14.0)]
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    monkeypatch.setattr(report.torch, "get_num_threads", lambda: 77)
    with pytest.raises(ValueError, match="measured with other threads; measure all of it anew"):
        report.write_report([fused], tmp_path, "cpu", again=True)
