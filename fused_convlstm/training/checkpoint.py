"""Checkpoints of a run: written in one piece, read without running a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..configuration import atomic_path

FORMAT = "fused_convlstm.checkpoint.1"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """``content`` is tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        OSError: the disk is full, for example.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:  # what PyTorch makes of a failed write
            raise OSError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What was saved, on the CPU.

    Raises:
        ValueError: the file is truncated or otherwise damaged, or no checkpoint.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path}: a damaged checkpoint, or none ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint in format {FORMAT!r}")
    return content
