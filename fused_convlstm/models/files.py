"""Weights in files: safetensors, with the configuration in their metadata. Nothing here runs a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..configuration import atomic_path
from .registry import create_model
from .streaming import StreamingModel

FORMAT = "fused_convlstm.model.1"


def save_model(path: str | os.PathLike[str], name: str, model: StreamingModel, **extra: Any) -> None:
    """Writes ``model``, made as ``create_model(name, ...)``, in one piece: a reader never sees half a file.

    ``extra`` is what a user of the weights needs to know (class names, preprocessing); it has to be JSON.
    """
    metadata = {"format": FORMAT, "model": name, "config": dataclasses.asdict(model.config), "extra": extra}
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    with atomic_path(Path(path)) as temporary:
        text = {key: json.dumps(value) for key, value in metadata.items()}
        temporary.write_bytes(safetensors.torch.save(tensors, text))


def load_model(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[StreamingModel, str, dict[str, Any]]:
    """The model in evaluation mode, its name, and the ``extra`` it was saved with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file {os.fspath(path)!r}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: damaged, or not a safetensors file of a model ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{os.fspath(path)}: expected a model in format {FORMAT!r}, got {metadata.get('format')!r}")
    model = create_model(metadata["model"], **metadata["config"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{os.fspath(path)}: the weights do not fit the configuration: {error}") from error
    return model.to(device).eval(), metadata["model"], metadata["extra"]
