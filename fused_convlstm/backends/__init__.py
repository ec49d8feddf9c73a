"""Backends: what runs a sequence. See ``registry`` for the choice and ``base`` for the interface."""

import importlib.util

from . import registry
from .cpu import CpuBackend
from .cuda import CudaBackend
from .registry import BackendError, use_backend

registry.register(CudaBackend())
registry.register(CpuBackend())
if importlib.util.find_spec("triton") is not None:
    from .triton import TritonBackend

    registry.register(TritonBackend())

__all__ = ["BackendError", "registry", "use_backend"]
