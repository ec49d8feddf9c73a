"""Versions, hardware and backends, for bug reports: ``python -m fused_convlstm info``."""

from __future__ import annotations

import platform
import sys

import torch

from . import __version__
from .backends import registry


def info() -> str:
    """A table of what is installed and what can run."""
    rows = {
        "fused_convlstm": __version__,
        "Python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA devices": ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())) or "none",
        "backend asked for": registry.requested_backend(None),
    }
    for name in registry.names():
        if name == registry.REFERENCE:
            rows[f"backend {name}"] = "available: any device, any floating-point type"
            continue
        backend = registry.get(name)
        reason = backend.unavailable()
        rows[f"backend {name}"] = "available" if reason is None else f"not available: {reason}"
        rows.update({f"  {key}": value for key, value in backend.info().items()})
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())
