"""The programs that measure on a GPU: where there is none, and everything about them that needs none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("program", ["gpu_report", "gpu_tune", "gpu_profile"])
def test_without_a_gpu_it_says_so_and_changes_nothing(program: str) -> None:
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.iterdir()) if results.exists() else []
    command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    assert before == (sorted(results.iterdir()) if results.exists() else [])


def make_result(implementation: str, ms: float, memory: float | None) -> Any:
    import gpu_report

    return gpu_report.Result("conv_lstm2d", "training", "bf16", "lip24", implementation, ms, ms, ms, memory, 0.5, 0.25)


def test_tables_and_chart(tmp_path: Path) -> None:
    import gpu_report

    results = [make_result("eager", 4.0, 100.0), make_result("compile", 3.0, 80.0)]
    results += [make_result("triton, channels last", 1.5, 60.0), make_result("cuda, channels last", 2.0, 70.0)]
    results += [make_result("triton, channels last, recompute", 2.0, 30.0)]
    results += [make_result("triton, channels last, CUDA graph", 1.6, None)]
    text = gpu_report.tables(results)
    assert (
        "| lip24 | 1.500 | triton, channels last | 3.000 | compile | 2.00 | 50% | 25% | 0.60, 0.30 recompute |" in text
    )
    assert "| geometric mean | | | | | 2.00 |" in text
    assert "| conv_lstm2d | training | bf16 | lip24 | 1.500 | 2.000 | 0.75 |" in gpu_report.backend_table(results)
    gpu_report.chart(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_every_planned_shape_exists() -> None:
    import gpu

    plan = gpu.plan()
    assert {problem.shape.name for problem in plan} == {shape.name for shape in gpu.GPU_SHAPES}
    assert plan[0].shape.name == "lip24"
    assert len({str(problem) for problem in plan}) == len(plan)


class Event:
    """A CUDA event's stand-in: every call takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The CPU in the place of the GPU, two small problems, and a folder for the results."""
    import gpu
    from shapes import Shape

    def nothing(*args: object) -> None:
        pass

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stand-in 1")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)
    monkeypatch.setattr(gpu, "graphed", lambda function: function)
    monkeypatch.setattr(gpu, "matmul_rate", lambda dtype: 1e12)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda: 1e12)
    monkeypatch.setattr(gpu, "launch_cost", lambda: 1e-6)
    monkeypatch.setattr(gpu, "allow_everything", nothing)
    monkeypatch.setattr(gpu, "compile_ahead", nothing)
    monkeypatch.setattr(gpu, "BACKENDS", ("cpu",))
    monkeypatch.setattr(gpu, "PEERS", ("eager", "channels_last"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    shape = Shape("small", 2, 3, 8, 16, 6, 6, 3)
    problems = [gpu.Problem(cell, shape, "tf32", training) for cell in gpu.CELLS for training in (True, False)]
    monkeypatch.setattr(gpu, "plan", lambda: problems)
    return tmp_path


@pytest.fixture
def run_report(stub: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    import gpu_report

    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: {"passed": "yes", "summary": "5 passed in 1 s"})
    monkeypatch.setattr(gpu_report, "run_sanitizer", lambda *_: "ERROR SUMMARY: 0 errors")

    def run(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments])
        code = gpu_report.main()
        return code, gpu_report.Report.load(stub / "gpu-stand-in-1.json")

    return run


def test_a_report_from_beginning_to_end(run_report: Callable[..., tuple[int, Any]], stub: Path) -> None:
    code, report = run_report("--minutes", "10")
    assert code == 0
    names = {"eager", "channels_last", "cpu", "cpu, channels last", "cpu, channels last, CUDA graph"}
    assert {r.implementation for r in report.results if r.task == "inference"} == names
    assert {r.implementation for r in report.results if r.task == "training"} == {
        *names,
        "cpu, channels last, recompute",
    }
    assert {r.cell for r in report.results} == {"conv_lstm2d", "pooled_gate_conv_lstm2d"}
    assert not report.failures
    assert not report.to_do()
    text = (stub / "gpu-stand-in-1.md").read_text()
    assert "5 passed" in text
    assert "prove nothing" not in text
    assert "Not measured" not in text
    assert (stub / "gpu-stand-in-1.png").exists()


def test_a_report_goes_on_where_it_stopped(
    run_report: Callable[..., tuple[int, Any]], stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu
    import gpu_report

    code, report = run_report("--minutes", "0.01")  # no time for any measurement
    assert code == 0
    assert report.results == []
    assert "Not measured, for want of time" in (stub / "gpu-stand-in-1.md").read_text()

    kept = make_result("eager", 123.0, 1.0)
    first = gpu.plan()[0]
    kept = replace(kept, cell=first.cell, task=first.task, precision="tf32", shape="small")
    report.results = [kept]
    report.save(stub / "gpu-stand-in-1.json")
    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: pytest.fail("the suite has passed already"))
    code, report = run_report("--minutes", "10")
    assert code == 0
    assert report.results[0] == kept
    assert not report.to_do()

    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: {"passed": "no", "summary": "1 failed"})
    monkeypatch.setattr(gpu, "code", lambda: "other code")
    code, report = run_report("--minutes", "0.01")
    assert code == 1
    assert report.results == []
    assert "prove nothing" in (stub / "gpu-stand-in-1.md").read_text()


def test_a_wrong_result_is_not_timed(
    run_report: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    prepare = gpu.prepare

    def wrong(problem: Any, name: str) -> Callable[[], object]:
        function = prepare(problem, name)
        if name != "cpu, channels last" or problem.training:
            return function
        return lambda: function() * 1.5  # type: ignore[operator]

    monkeypatch.setattr(gpu, "prepare", wrong)
    code, report = run_report("--minutes", "10")
    assert code == 1
    assert len(report.failures) == 2
    assert all("differs from the first implementation" in why for why in report.failures.values())
    assert not any(r.implementation == "cpu, channels last" and r.task == "inference" for r in report.results)


def test_a_backend_that_cannot_run_is_a_failure(
    run_report: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "no such backend"))
    code, report = run_report("--minutes", "0.01")
    assert code == 1
    assert report.failures == {"no such backend": "not registered"}


def test_what_pytest_said_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine every GPU test is skipped: that is no pass."""
    import gpu
    import gpu_report

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a():\n    pytest.skip('no GPU')\n"
    )
    (tmp_path / "tests" / "test_other.py").write_text("import what_is_not_there\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    result = gpu_report.run_tests(120, tmp_path / "log")
    assert result["passed"] == "no"
    assert "1 skipped" in result["summary"]
    (tmp_path / "tests" / "test_some.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n")
    result = gpu_report.run_tests(120, tmp_path / "log")
    assert result["passed"] == "yes"
    assert "1 passed" in (tmp_path / "log").read_text()


def test_tuning_table(tmp_path: Path) -> None:
    import gpu_tune

    rows = [
        {
            "problem": "p",
            "kernel": "forward",
            "rest": [],
            "chosen": "a",
            "times": {"a": 2.0, "b": 1.0, "c": float("inf")},
        }
    ]
    facts = {
        "machine": {"device": "d"},
        "done": [],
        "triton": rows,
        "cuda": [{"problem": "q", "times": {"chosen": 1.0, "small": None}}],
    }
    gpu_tune.save(tmp_path / "tuning.json", facts)
    text = (tmp_path / "tuning.md").read_text()
    assert "| p, forward [] | a | 2.0000 | b | 1.0000 | 100% |" in text
    assert "| q | chosen | 1.0000 | chosen | 1.0000 | 0% |" in text
    assert json.loads((tmp_path / "tuning.json").read_text()) == facts


def test_profile_tables() -> None:
    import gpu_profile
    from gpu_profile import Launch

    launches = [Launch("a", 0.0, 10.0), Launch("b", 5.0, 20.0), Launch("a", 30.0, 40.0)]
    assert gpu_profile.busy(launches) == 30.0
    table = gpu_profile.kernel_table(launches, calls=2)
    assert "| `a` | 1 | 10.0 | 0.010 | 57% |" in table
    assert "| `b` | 0.5 | 15.0 | 0.007 | 43% |" in table or "| `b` | 0.5 | 15.0 | 0.008 | 43% |" in table


def test_profile_reads_ncu() -> None:
    import gpu_profile

    text = "==PROF== Connected\n" + "\n".join(
        [
            '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"',
            '"0","k","GPU Speed Of Light Throughput","Duration","us","12.5"',
            '"0","k","Launch Statistics","Registers Per Thread","register/thread","128"',
            '"1","k","GPU Speed Of Light Throughput","Duration","us","99"',
        ]
    )
    table = gpu_profile.ncu_table(text)
    assert "| `k` | 12.5 us |" in table
    assert "128 register/thread" in table
    assert "99" not in table
    assert "gave nothing" in gpu_profile.ncu_table("==ERROR== no permission")
