"""The C++ kernels for CPUs."""

from .backend import CpuBackend

__all__ = ["CpuBackend"]
