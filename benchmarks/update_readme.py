"""Puts the tables that programs make into README.md, between their markers.

python benchmarks/update_readme.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fused_convlstm.capabilities import capabilities

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def sections() -> dict[str, str]:
    """The text of each generated section by the name of its marker."""
    made = {"capabilities": capabilities()}
    # A report of each GPU: gpu-DEVICE.md.
    for name, pattern in (("cpu", "cpu.md"), ("gpu", "gpu-*.md"), ("models-cuda", "models-cuda.md")):
        reports = sorted((ROOT / "benchmarks" / "results").glob(pattern))
        if reports:
            made[f"benchmark-{name}"] = "\n\n".join(report.read_text().strip() for report in reports)
    return made


def replace_sections(text: str, sections: dict[str, str]) -> str:
    """``text`` with what stands between the markers of each section replaced by its content."""
    for name, content in sections.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def updated(text: str) -> str:
    """``text`` with every marked section replaced by its current content."""
    return replace_sections(text, sections())


if __name__ == "__main__":
    current = README.read_text()
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if updated(current) == current else "README.md is out of date: run benchmarks/update_readme.py")
    README.write_text(updated(current))
