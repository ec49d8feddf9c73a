"""The backend ``cuda``: C++ kernels for NVIDIA GPUs from sm_80 on."""

from .backend import CudaBackend

__all__ = ["CudaBackend"]
