"""Whether a compiled module belongs to the sources that it lies among.

A package installed with ``pip install -e`` keeps its compiled modules when the sources change under them, after a pull
say. The Python code would then hand them arguments that they take to mean something else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
_ROOT = Path(__file__).resolve().parents[2]


def digest(folder: Path) -> str:
    """A short hash over names and contents of a folder's C++ and CUDA sources. ``setup.py`` compiles it in."""
    result = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES:
            result.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return result.hexdigest()[:16]


def check_sources(module: ModuleType, folder: str, root: Path = _ROOT) -> None:
    """Raises ImportError if ``module`` was built from other sources than those in ``root / "csrc" / folder``.

    In an installed package there are none, and nothing to check.
    """
    sources = root / "csrc" / folder
    if (root / "setup.py").is_file() and sources.is_dir() and getattr(module, "SOURCES", None) != digest(sources):
        raise ImportError(
            f"{module.__name__} was built from other sources than {sources} holds; build it again: `pip install -e .`"
        )
