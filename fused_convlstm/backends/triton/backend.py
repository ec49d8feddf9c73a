"""The Triton kernels, for GPUs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..base import Backend
from ..call import SAVE_NOTHING, Call
from . import conv_lstm2d, pooled_gate_conv_lstm2d
from .launch import capability, interpreting

MINIMUM_CAPABILITY = 80  # bfloat16, tf32 and asynchronous copies


class TritonBackend(Backend):
    """One launch per timestep; see docs/triton.md."""

    name = "triton"

    def unavailable(self) -> str | None:
        if interpreting() or torch.cuda.is_available():
            return None
        return "no CUDA device (the interpreter, TRITON_INTERPRET=1, needs none)"

    def refuse(self, call: Call) -> str | None:
        if interpreting():
            if call.device.type != "cpu":
                return f"Triton's interpreter serves CPU tensors, not {call.device.type}"
            if call.dtype == torch.bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly"
        elif call.device.type != "cuda":
            return f"it serves CUDA tensors, not {call.device.type}"
        elif self._too_old(call.device):
            return f"compute capability {capability(call.device) / 10}, at least {MINIMUM_CAPABILITY / 10} is needed"
        if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"{call.dtype}; float32, float16 and bfloat16 are served"
        if call.save != SAVE_NOTHING and call.options.padding_mode in ("replicate", "reflect"):
            return f"gradients with padding_mode={call.options.padding_mode!r}; inference and other modes are served"
        return None

    def _too_old(self, device: torch.device) -> bool:
        # What the kernels serve can be asked where there is no GPU.
        known = torch.cuda.is_available() and torch.version.hip is None
        return known and capability(device) < MINIMUM_CAPABILITY

    def info(self) -> dict[str, str]:
        return {"triton": triton.__version__, "interpreter": "yes" if interpreting() else "no"}

    def conv_lstm2d(self, input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(input):
            return conv_lstm2d.forward(input, *args)

    def conv_lstm2d_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(args[3]):
            return conv_lstm2d.backward(*args)

    def pooled_gate_conv_lstm2d(
        self, input: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        with torch.cuda.device_of(input):
            return pooled_gate_conv_lstm2d.forward(input, *args)

    def pooled_gate_conv_lstm2d_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(args[3]):
            return pooled_gate_conv_lstm2d.backward(*args)
