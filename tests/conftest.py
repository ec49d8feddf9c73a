from __future__ import annotations

import json
import os
from collections.abc import Generator

import pytest
import torch

WORKER = "PYTEST_XDIST_WORKER" in os.environ
# A file that gets a line of JSON for each test as it begins and for each outcome: what is known if pytest is killed.
LOG = os.environ.get("FUSED_CONVLSTM_TEST_LOG")

# Minutes each: first, so that no process waits for another at the end.
LONG = ("test_triton_interpreted.py", "test_cpu_sanitizers.py", "test_cuda_build.py", "test_gpu_report.py")

torch.manual_seed(0)
if WORKER:
    # Worker processes share the cores: one thread each; tests of threading set their own number.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # a test is the same whichever ran before it in the process


def note(test: str, outcome: str, said: str = "") -> None:
    if LOG:
        with open(LOG, "a") as log:
            log.write(json.dumps({"test": test, "outcome": outcome, "said": said}) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    if not WORKER:  # xdist tells everything to the process that started the workers
        note(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not WORKER and (report.when == "call" or not report.passed):
        note(report.nodeid, report.outcome, report.longreprtext[-4000:])


@pytest.hookimpl(wrapper=True, trylast=True)  # within the time that pytest-timeout gives a test
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that left CUDA unusable takes its process along, or every later test there would fail."""
    done = yield  # its reports are sent
    if item.get_closest_marker("gpu") and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            note(item.nodeid, "failed", str(error))
            if WORKER:
                os._exit(1)  # xdist reports this test as the one that crashed, and starts a new worker
            pytest.exit(f"{item.nodeid} left CUDA unusable: {error}", returncode=1)
    return done
