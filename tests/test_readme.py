"""What README.md says is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_generated_tables_are_current() -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "update_readme.py", "--check"], check=True)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:2])
def test_examples_run(code: str) -> None:
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    exec(compile(first if code == first else first + code, "README.md", "exec"), {})


def test_swap_example_prints_what_stands_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, expected = re.search(r"```python\n([^`]*import swap[^`]*)```[^`]*```\n([^`]*)```", README).groups()
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})

    def words(text: str) -> list[str]:
        """Without the numbers that differ from machine to machine."""
        return re.sub(r"\d+\.\d+(e-\d+)?", "N", text).split()

    printed = capsys.readouterr().out
    assert words(printed) == words(expected)
    assert all(float(error) < 1e-6 for error in re.findall(r"\d\.\de-\d+", printed))


def test_info_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fused_convlstm", "info"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for word in ("fused_convlstm", "torch", "CPU threads", "backend cpu", "backend reference"):
        assert word in result.stdout
