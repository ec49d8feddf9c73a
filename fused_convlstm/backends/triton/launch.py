"""Launching kernels: what the device is, what arithmetic is allowed, and a launcher that is cheap to call again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..tf32 import round_to_tf32, tf32_allowed
from ..tracing import constant
from .tile import Tile

INTERPRETING = bool(triton.knobs.runtime.interpret)  # decided when the kernels are defined


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when Triton was imported)."""
    return INTERPRETING


@cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@constant
def capability(device: torch.device) -> int:
    """Compute capability as major * 10 + minor."""
    properties = _properties(_index(device))
    return int(properties.major * 10 + properties.minor)


def multiprocessors(device: torch.device) -> int:
    return int(_properties(_index(device)).multi_processor_count)


def convolution_precision(dtype: torch.dtype) -> str:
    """How the dots of a float32 convolution are computed: "tf32" where torch allows it for its own, else "ieee"."""
    if dtype != torch.float32 or INTERPRETING:
        return "ieee"
    return "tf32" if tf32_allowed() else "ieee"


def rounded(weight: Tensor, precision: str) -> Tensor:
    """``weight`` as the products in this precision take it."""
    return round_to_tf32(weight) if precision == "tf32" else weight


class StepLauncher:
    """One kernel launched once a timestep, with the same arguments but for a few integers.

    The first launch goes through Triton's dispatch, which compiles and picks the variant; the others call the
    compiled kernel directly with raw addresses, which saves most of the host's time. ``varying`` must not be
    specialised on. A launcher belongs to one call: to its device and its stream.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: dict[str, Any], varying: Sequence[str], tile: Tile
    ) -> None:
        self._names = kernel.arg_names
        missing = set(self._names) ^ {*arguments, *varying}
        assert not missing, f"arguments: {sorted(missing)}"
        self._kernel = kernel
        self._grid = (programs, 1, 1)
        self._arguments = [arguments.get(name, 0) for name in self._names]
        self._positions = [self._names.index(name) for name in varying]
        self._options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
        self._tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}  # kept alive
        self._compiled: Callable[..., None] | None = None
        self._stream = 0

    def bind(self, name: str, tensor: Tensor) -> None:
        """Replaces a tensor by one of the same type and strides."""
        # The variant may rely on addresses being multiples of 16.
        realigned = (self._tensors[name].data_ptr() ^ tensor.data_ptr()) % 16 != 0
        self._tensors[name] = tensor
        if self._compiled is not None and realigned:
            self._compiled = None
            self._arguments = [self._tensors.get(n, a) for n, a in zip(self._names, self._arguments, strict=True)]
        self._arguments[self._names.index(name)] = tensor if self._compiled is None else tensor.data_ptr()

    def __call__(self, *values: int) -> None:
        """Launches with these values of the varying arguments."""
        for position, value in zip(self._positions, values, strict=True):
            self._arguments[position] = value
        if self._compiled is not None:
            self._compiled(*self._arguments, stream=self._stream)
            return
        compiled = self._kernel[self._grid](*self._arguments, **self._options)
        if compiled is not None:  # the interpreter compiles nothing
            self._arguments = [a.data_ptr() if isinstance(a, Tensor) else a for a in self._arguments]
            self._compiled = compiled[self._grid]
            self._stream = torch.cuda.current_stream().cuda_stream


def passes_int32(*tensors: Tensor | None) -> bool:
    """Whether an offset within one frame of a (T, B, ...) tensor can pass 2^31 elements."""
    return any(
        sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in tensors
        if x is not None
    )
