"""Backends: what runs a sequence. See ``registry`` for the choice and ``base`` for the interface."""

from . import registry
from .base import AbsentBackend, Backend
from .cpu import CpuBackend
from .cpu.winograd import use_winograd
from .cuda import CudaBackend
from .registry import BackendError, use_backend

OLDEST_TRITON = (3, 4)


def _triton_backend() -> Backend:
    try:
        import triton
    except ImportError as error:
        return AbsentBackend("triton", f"Triton is not installed ({error})")
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return AbsentBackend("triton", f"Triton {triton.__version__} is installed, at least {oldest} is needed")
    from .triton import TritonBackend

    return TritonBackend()


registry.register(CudaBackend())
registry.register(CpuBackend())
registry.register(_triton_backend())

__all__ = ["BackendError", "registry", "use_backend", "use_winograd"]
