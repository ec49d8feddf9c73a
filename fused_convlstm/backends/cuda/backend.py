"""What the CUDA kernels serve, and the way from a call to them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..base import Backend
from ..call import Call
from ..sources import check_sources
from ..tf32 import tf32_allowed
from ..tracing import constant
from . import conv_lstm2d, measured, pooled_gate
from .parameters import BFLOAT16, FLOAT32, HALF, TF32, Kernels, chunk_elements, padded

MINIMUM_CAPABILITY = (8, 0)
FRAME_BYTES = 2**30  # offsets within a frame, and the number of a pixel in a launch, are 32-bit
ROWS = 2**30


class CudaBackend(Backend):
    """Kernels in ``fused_convlstm._cuda``."""

    name = "cuda"
    device_type = "cuda"

    def unavailable(self) -> str | None:
        module = self._module
        if isinstance(module, str):
            return module
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        return None

    def refuse(self, call: Call) -> str | None:
        options = call.options
        if call.device.type != self.device_type:
            return f"the input is on {call.device.type}, the kernels run on {self.device_type}"
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {call.dtype}: float32, float16 and bfloat16 are served"
        if options.padding_mode != "zeros":
            return f"padding_mode {options.padding_mode!r}: only 'zeros' is served"
        if options.groups != 1:
            return f"groups {options.groups}: only 1 is served"
        if call.peephole == "pixel":
            return "peephole per pixel: none and per channel are served"
        pixels = call.state_size[0] * call.state_size[1]
        elements = chunk_elements(call.dtype)
        frame = max(
            call.input_size[0] * call.input_size[1] * padded(call.in_channels, elements),
            pixels * padded(4 * call.hidden_channels, elements),
        )
        if frame * call.dtype.itemsize >= FRAME_BYTES or call.steps * call.batch * pixels >= ROWS:
            return "a frame of 1 GiB or more, or a sequence of 2^30 pixels or more"
        if self.unavailable() is not None:
            return None  # what the kernels serve can be asked where they cannot run
        return self._refuse_device(call.device) or self._refuse_shared_memory(call)

    def _refuse_shared_memory(self, call: Call) -> str | None:
        if call.cell != "pooled_gate_conv_lstm2d":
            return None
        needed = _pooled_gate_shared_bytes(self._module, self._number(call.dtype), call.hidden_channels)
        there = self._shared_bytes(call.device)
        if isinstance(there, int) and needed > there:
            return f"{call.hidden_channels} channels need {needed} bytes of shared memory; the device has {there}"
        return None

    def _shared_bytes(self, device: torch.device) -> int | str:
        """Shared memory that a block may have, or why the extension cannot run on the device."""
        index = torch.cuda.current_device() if device.index is None else device.index
        return _shared_bytes_per_block(self._module, index)

    @property
    def _module(self) -> Any:
        """The extension, or why there is none."""
        return _extension()

    def _refuse_device(self, device: torch.device) -> str | None:
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]}: 8.0 and later are served"
        answer = self._shared_bytes(device)
        if isinstance(answer, str):  # not compiled for it, or by a newer CUDA than the driver's
            return f"the extension, built for {self._module.architectures}, cannot run on the device ({answer})"
        return None

    def decline(self, call: Call) -> str | None:
        return measured.prefer_other(call, torch.cuda.get_device_capability(call.device))

    def info(self) -> dict[str, str]:
        module = self._module
        return {} if isinstance(module, str) else {"architectures": module.architectures}

    def _kernels(self, input: Tensor) -> Kernels:
        device = torch.cuda.current_device() if input.device.index is None else input.device.index
        return Kernels(self._module, self._number(input.dtype), device, torch.cuda.current_stream(device).cuda_stream)

    def _number(self, dtype: torch.dtype) -> int:
        """The number format: tf32 where PyTorch may use it for its own convolutions."""
        if dtype == torch.float32:
            return TF32 if tf32_allowed() else FLOAT32
        return HALF if dtype == torch.float16 else BFLOAT16

    @contextmanager
    def _on_device(self, input: Tensor) -> Iterator[None]:
        """The input's device is current, and what goes through cuDNN gives the same bits every time."""
        before = torch.backends.cudnn.deterministic
        torch.backends.cudnn.deterministic = True
        try:
            with torch.cuda.device(input.device):
                yield
        finally:
            torch.backends.cudnn.deterministic = before

    def conv_lstm2d(self, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with self._on_device(input):
            return conv_lstm2d.forward(self._kernels(input), input, *args)

    def conv_lstm2d_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        with self._on_device(args[3]):
            return conv_lstm2d.backward(self._kernels(args[3]), *args)

    def pooled_gate_conv_lstm2d(
        self, input: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        with self._on_device(input):
            return pooled_gate.forward(self._kernels(input), input, *args)

    def pooled_gate_conv_lstm2d_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        with self._on_device(args[3]):
            return pooled_gate.backward(self._kernels(args[3]), *args)


@constant
def _extension() -> ModuleType | str:
    """``fused_convlstm._cuda``, or why there is none."""
    return _load()


@constant
def _shared_bytes_per_block(module: Any, device: int) -> int | str:
    """Shared memory that a block may have, or what the driver has against the extension."""
    return _ask_driver(module, device)


@constant
def _pooled_gate_shared_bytes(module: Any, number: int, hidden_channels: int) -> int:
    return int(module.pooled_gate_shared_bytes(number, hidden_channels))


@cache
def _load() -> ModuleType | str:
    try:
        module = importlib.import_module("fused_convlstm._cuda")
        check_sources(module, "cuda")
    except ImportError as error:
        return f"the extension fused_convlstm._cuda is not built or cannot be loaded ({error})"
    return module


@cache
def _ask_driver(module: Any, device: int) -> int | str:
    """Once: every call of an operator wants to know, also one that another backend serves."""
    try:
        return int(module.shared_bytes_per_block(device))
    except RuntimeError as error:
        return str(error)
