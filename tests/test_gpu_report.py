"""The programs that measure on a GPU: where there is none, and everything about them that needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
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


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The CPU in the place of the GPU, four small problems, and a folder for the results."""
    import gpu
    import gpu_stand_in

    gpu_stand_in.install(monkeypatch.setattr)
    monkeypatch.setattr(gpu, "compile_ahead", gpu_stand_in.nothing)
    return tmp_path


@pytest.fixture
def run_report(stub: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    import gpu
    import gpu_report

    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: ({"passed": "yes", "summary": "5 passed"}, {}))
    monkeypatch.setattr(gpu_report, "run_sanitizer", lambda *_: "ERROR SUMMARY: 0 errors")
    monkeypatch.setattr(gpu, "WAIT", 20.0)

    def run(*arguments: str) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--results", str(stub), *arguments])
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
    kept = replace(kept, cell=first.cell, task=first.task, shape="small")
    report.results = [kept]
    report.save(stub / "gpu-stand-in-1.json")
    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: pytest.fail("the suite has passed already"))
    code, report = run_report("--minutes", "10")
    assert code == 0
    assert report.results[0] == kept
    assert not report.to_do()

    monkeypatch.setattr(gpu_report, "run_tests", lambda *_: ({"passed": "no", "summary": "1 failed"}, {"test_a": "no"}))
    monkeypatch.setattr(gpu, "code", lambda: "other code")
    code, report = run_report("--minutes", "0.01")
    assert code == 1
    assert {r.implementation for r in report.results} == {"eager", "channels_last"}  # they are what they were
    assert "- `test_a`: no" in (stub / "gpu-stand-in-1.md").read_text()
    assert "prove nothing" in (stub / "gpu-stand-in-1.md").read_text()


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("wrong", "RuntimeError: differs from plain PyTorch by 0.5 of its norm"),
        ("unusable", "illegal memory access was encountered (CUDA unusable afterwards)"),
        ("dies", "the process died, exit code 1"),
        ("hangs", "not done within 8 s"),
    ],
)
def test_one_bad_implementation(
    fault: str, why: str, run_report: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a failure, not tried again; everything else is measured."""
    import gpu
    import gpu_stand_in

    monkeypatch.setenv(gpu_stand_in.FAULT, fault)
    if fault == "hangs":
        monkeypatch.setattr(gpu, "WAIT", 8.0)
    code, report = run_report("--minutes", "10")
    assert code == 1
    assert list(report.failures) == [", ".join(gpu_stand_in.FAULTY)]
    assert why in report.failures[", ".join(gpu_stand_in.FAULTY)]
    assert len(report.results) == sum(len(gpu.implementations(p.training)) for p in gpu.plan()) - 1
    assert report.to_do() == []
    monkeypatch.setattr(gpu.Child, "call", lambda *_, **__: ({}, 1.0, 1.0))  # only the rates
    assert run_report("--minutes", "10")[1].failures == report.failures


def test_a_child_that_failed_is_followed_by_another(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    with gpu.Child() as child:
        assert child.call(60, int, "1") == 1
        first = child.process.pid
        with pytest.raises(gpu.ChildError, match="ValueError"):
            child.call(60, int, "one")
        assert child.process.pid == first
        with pytest.raises(gpu.ChildError, match="not done within 1 s"):
            child.call(1, time.sleep, 600, kind="slow")
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        with pytest.raises(gpu.ChildError, match="not done within 1 s"):
            child.call(1, time.sleep, 600, kind="slow")
        with pytest.raises(gpu.ChildError, match="not tried: slow has hung twice"):
            child.call(600, time.sleep, 600, kind="slow")
        assert child.call(60, int, "2") == 2
        second = child.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_compiling_ahead_goes_on_after_a_crash(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import gpu
    import gpu_stand_in

    monkeypatch.undo()
    gpu_stand_in.install(monkeypatch.setattr)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv(gpu_stand_in.FAULT, "unusable")
    gpu.compile_ahead([(problem, "cpu, channels last") for problem in gpu.plan()], 300)
    printed = capfd.readouterr().out
    assert "compiled ahead 3 of 4" in printed
    assert "unusable" in printed


def test_a_backend_that_cannot_run_is_a_failure(
    run_report: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    monkeypatch.setattr(gpu, "BACKENDS", ("cpu", "no such backend"))
    code, report = run_report("--minutes", "0.01")
    assert code == 1
    assert report.failures == {"no such backend": "not registered"}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, float], Any]:
    """Runs a GPU suite of one file, beside this conftest.py; CUDA is there, and breaks where a test sets ``broken``."""
    import gpu
    import gpu_report

    tests = tmp_path / "tests"
    tests.mkdir()
    stand_in = """
broken = False
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize
"""
    (tests / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text() + stand_in)
    (tests / "test_other.py").write_text("import what_is_not_there\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\npythonpath = tests\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "code", lambda: "this code")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this suite's own

    def run(source: str, seconds: float = 120) -> Any:
        (tests / "test_some.py").write_text(
            f"import os, pytest, time, conftest\npytestmark = pytest.mark.gpu\n{source}"
        )
        return gpu_report.run_tests(seconds, tmp_path / "log.log")

    return run


def test_what_pytest_said_is_kept(suite: Callable[..., Any], tmp_path: Path) -> None:
    """On a machine where every GPU test is skipped: that is no pass."""
    result, wrong = suite("def test_a():\n    pytest.skip('no GPU')\n")
    assert result == {"passed": "no", "summary": "1 skipped, exit code 0"}
    assert wrong == {}
    result, wrong = suite("def test_a(): pass\n")
    assert result == {"passed": "yes", "summary": "1 passed"}
    assert wrong == {}
    assert "1 passed" in (tmp_path / "log.log").read_text()


def test_a_test_that_breaks_cuda_fails_alone(suite: Callable[..., Any]) -> None:
    pytest.importorskip("xdist")
    source = """
@pytest.mark.parametrize("k", range(60))
def test_k(k):
    conftest.synchronize()
    conftest.broken |= k == 5
    time.sleep(0.02)
"""
    result, wrong = suite(source)
    assert result["passed"] == "no"
    assert result["summary"] == "1 failed, 59 passed, exit code 1"
    ((test, why),) = wrong.items()
    assert test.endswith("test_some.py::test_k[5]")
    assert "CUDA error" in why or "crashed" in why


def test_what_has_passed_is_not_run_again(
    suite: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    source = """
@pytest.mark.parametrize("k", range(4))
def test_k(k):
    assert k != 1, "one is bad"
    time.sleep(0 if k != 3 else {})
"""
    result, wrong = suite(source.format(600), 25)
    assert result["passed"] == "no"
    assert result["summary"] == "1 failed, 2 passed, 1 started, not done within 25 s"
    assert wrong.keys() == {f"tests/test_some.py::test_k[{k}]" for k in (1, 3)}
    assert "one is bad" in wrong["tests/test_some.py::test_k[1]"]
    assert wrong["tests/test_some.py::test_k[3]"] == "began and did not end"

    result, wrong = suite(source.format(0).replace("!= 1", "!= 2"))  # what passed is left alone: 2 would fail now
    assert result == {"passed": "yes", "summary": "4 passed"}
    monkeypatch.setattr(gpu, "code", lambda: "other code")
    result, wrong = suite(source.format(0).replace("!= 1", "!= 2"))
    assert result["summary"] == "1 failed, 3 passed, exit code 1"


def test_what_the_sanitizer_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_report

    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: name)
    for code, said, expected, clean in [
        (0, "========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 0 errors", True),
        (9, "RACECHECK SUMMARY: 1 hazards displayed (1 error, 0 warnings)", "RACECHECK SUMMARY: 1 hazards", False),
        (1, "ImportError\nERROR SUMMARY: 0 errors", "exit code 1: ImportError", False),
        (None, "", "not done within 5 s", False),
    ]:
        monkeypatch.setattr(gpu, "run_program", lambda *_, result=(code, said): result)
        result = gpu_report.run_sanitizer("memcheck", "cuda", 5)
        assert result.startswith(expected)
        assert gpu_report.clean(result) == clean


def test_a_finding_of_the_sanitizer_is_a_failure(
    run_report: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu
    import gpu_report

    monkeypatch.setattr(gpu_report, "run_sanitizer", lambda *_: "ERROR SUMMARY: 3 errors")
    monkeypatch.setattr(gpu, "plan", list)
    code, report = run_report("--minutes", "10")
    assert code == 1
    assert report.sanitizer == {"memcheck, cpu": "ERROR SUMMARY: 3 errors", "racecheck, cpu": "ERROR SUMMARY: 3 errors"}
    assert report.failures == {}


def test_tuning_goes_on_after_a_crash(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_stand_in
    import gpu_tune

    monkeypatch.setenv(gpu_stand_in.FAULT, "dies")
    monkeypatch.setattr(gpu_tune, "CUDA_TILES", {"chosen": 0})
    monkeypatch.setattr(sys, "argv", ["gpu_tune.py", "--results", str(stub)])
    assert gpu_tune.main() == 1
    facts = json.loads((stub / "tuning-stand-in-1.json").read_text())
    bad = gpu_stand_in.FAULTY[0]
    assert facts["failed"] == {f"{bad}, cpu": "chosen: the process died, exit code 1"}
    assert {row["problem"]: row["times"]["chosen"] for row in facts["cuda"]} == {
        str(problem): None if str(problem) == bad else 1.0 for problem in gpu.plan()
    }
    assert "the process died" in (stub / "tuning-stand-in-1.md").read_text()
    monkeypatch.setattr(gpu.Child, "call", lambda *_, **__: pytest.fail("measured a second time"))
    assert gpu_tune.main() == 1


def test_a_profile_goes_on_after_a_crash(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_profile
    import gpu_stand_in

    monkeypatch.setenv(gpu_stand_in.FAULT, "dies")
    monkeypatch.setattr(gpu_profile, "ncu", lambda problem, name: "what ncu says")
    options = ["--results", str(stub), "--shapes", "small"]
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", *options, "--minutes", "0"])
    assert gpu_profile.main() == 1
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", *options])
    assert gpu_profile.main() == 1
    text = (stub / "profile-stand-in-1.md").read_text()
    assert text.count("A call 1.000 ms") == len(gpu.plan()) - 1
    assert text.count("Failed: the process died") == 1
    monkeypatch.setattr(gpu.Child, "call", lambda *_, **__: pytest.fail("measured a second time"))
    monkeypatch.setattr(sys, "argv", ["gpu_profile.py", *options, "--ncu"])
    assert gpu_profile.main() == 1
    assert (stub / "profile-stand-in-1.md").read_text().count("what ncu says") == len(gpu.plan())


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
        "failed": {},
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
