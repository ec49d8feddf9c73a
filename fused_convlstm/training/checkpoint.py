"""Checkpoints of a run: written in one piece, read without running a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..configuration import atomic_path

FORMAT = "fused_convlstm.checkpoint.1"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """``content`` is tensors, numbers, strings, and lists and dictionaries of them."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was saved, on the CPU.

    Raises:
        ValueError: the file is truncated or otherwise damaged, or no checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, LookupError) as error:
        raise ValueError(f"{path}: a damaged checkpoint, or none ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint in format {FORMAT!r}")
    return content
