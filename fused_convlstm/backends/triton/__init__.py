"""The Triton backend. Importing it needs Triton."""

from .backend import TritonBackend
from .tuning import autotune, measured

__all__ = ["TritonBackend", "autotune", "measured"]
