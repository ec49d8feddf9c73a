"""The C++ kernels for CPUs: the extension ``fused_convlstm._cpu`` behind the interface of a backend."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch  # before the extension: both then share torch's OpenMP runtime
from torch import Tensor

from ...ops._sequence import empty_gradient
from ...ops.layout import empty_frames_like, empty_state_like
from .. import registry
from ..base import Backend
from ..call import (
    SAVE_CELLS,
    SAVE_GATES,
    SAVE_NOTHING,
    Call,
    ConvLSTMOptions,
    conv_output_size,
    kept_cells_dtype,
    same_padding,
    state_dtype,
)
from ..sources import check_sources
from . import pooled_gate, winograd
from .arguments import DTYPES, GATE_ACTIVATIONS, PADDING_MODES, views

try:
    from ... import _cpu

    check_sources(_cpu, "cpu")
except ImportError as error:
    _import_error: ImportError | None = error
    warnings.warn(
        f"fused_convlstm: on the CPU everything will run on the slow reference, because {error}. The compiled kernels "
        "are installed by `pip install .`; a source folder that is imported from must be installed with `-e`.",
        RuntimeWarning,
        stacklevel=2,
    )
else:
    _import_error = None

_SAVES = {SAVE_NOTHING: 0, SAVE_CELLS: 1, SAVE_GATES: 2}  # the numbers of csrc/cpu's enumeration

_MAX_IMAGE_ELEMENTS = 2**31 - 1  # pixels times channels of one image: the kernels count them in 32 bits


class CpuBackend(Backend):
    """Whole sequences in C++ with run-time choice of the instruction set."""

    name = "cpu"

    def unavailable(self) -> str | None:
        return None if _import_error is None else f"the extension fused_convlstm._cpu is not usable: {_import_error}"

    def refuse(self, call: Call) -> str | None:
        if call.device.type != "cpu":
            return f"tensors on {call.device}, not on the CPU"
        if call.dtype not in DTYPES:
            return f"{call.dtype}; the CPU kernels compute in float32, bfloat16 and float64"
        if call.cell == "pooled_gate_conv_lstm2d":
            return None
        for size, channels in ((call.input_size, call.in_channels), (call.state_size, call.hidden_channels)):
            if (size[0] * size[1] + 1) * 4 * channels > _MAX_IMAGE_ELEMENTS:
                return f"an image of {size} with {channels} channels is larger than the kernels address"
        return None

    def info(self) -> dict[str, str]:
        if _import_error is not None:
            return {}
        return {
            "instruction sets compiled": ", ".join(_cpu.compiled_instruction_sets()),
            "instruction sets of this machine": ", ".join(_cpu.detected_instruction_sets()),
            "instruction set in use": _cpu.instruction_set(),
            "threads": str(torch.get_num_threads()),
            "Winograd": winograd.describe(),
        }

    def conv_lstm2d(
        self,
        input: Tensor,  # (T, B, Cin, H, W)
        h_0: Tensor | None,  # (B, C, Ho, Wo)
        c_0: Tensor | None,  # (B, C, Ho, Wo)
        weight_ih: Tensor,  # (4 * C, Cin / groups, kh, kw)
        weight_hh: Tensor,  # (4 * C, C / groups, rh, rw)
        bias: Tensor | None,  # (4 * C,)
        peephole: Tensor | None,  # (3, C) or (3, C, Ho, Wo)
        step_flags: Tensor | None,  # (T, B) uint8
        options: ConvLSTMOptions,
        save: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        channels = weight_ih.size(0) // 4
        size = _state_size(input, weight_ih, options)
        output = empty_frames_like(input, channels, *size)
        h_n = empty_state_like(input, channels, *size, input.dtype)
        c_n = empty_state_like(input, channels, *size, state_dtype(input.dtype))
        frames = (input.size(0), input.size(1), *size)
        gates = input.new_empty((*frames, 4 * channels) if save == SAVE_GATES else (0,))
        cells_dtype = kept_cells_dtype(input.dtype, peephole is not None)
        cells = input.new_empty((*frames, channels) if save != SAVE_NOTHING else (0,), dtype=cells_dtype)
        transformed = winograd.choose(input, weight_ih, weight_hh, options, size)
        if transformed.gates:
            registry.note(f"cpu: gates by Winograd's {winograd.filter_name(transformed.gates)}")
        _cpu.conv_lstm2d(
            _sizes(input, weight_ih, weight_hh, peephole, size, options, transformed),
            views(input, h_0, c_0, weight_ih, weight_hh, bias, peephole, step_flags, output),
            views(h_n, c_n),
            gates.data_ptr(),
            cells.data_ptr(),
            _SAVES[save],
        )
        return output, h_n, c_n, gates, cells

    def conv_lstm2d_backward(
        self,
        grad_output: Tensor | None,  # (T, B, C, Ho, Wo)
        grad_h_n: Tensor | None,  # (B, C, Ho, Wo)
        grad_c_n: Tensor | None,  # (B, C, Ho, Wo)
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        step_flags: Tensor | None,
        output: Tensor,
        gates: Tensor,
        cells: Tensor,
        options: ConvLSTMOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        tensors = (input, h_0, c_0, weight_ih, weight_hh, bias, peephole)
        grads = tuple(
            empty_gradient(k, tensor, input) if needed and tensor is not None else None
            for k, (tensor, needed) in enumerate(zip(tensors, needs, strict=True))
        )
        size = (output.size(3), output.size(4))
        transformed = winograd.choose(input, weight_ih, weight_hh, options, size)
        if any(transformed[1:]):
            registry.note(f"cpu: by Winograd, gradients {transformed.gradients()}")
        _cpu.conv_lstm2d_backward(
            _sizes(input, weight_ih, weight_hh, peephole, size, options, transformed),
            views(*tensors, step_flags, output),
            gates.data_ptr(),
            cells.data_ptr(),
            views(grad_output, grad_h_n, grad_c_n),
            views(*grads),
        )
        return grads

    def pooled_gate_conv_lstm2d(self, *args: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return pooled_gate.forward(*args)

    def pooled_gate_conv_lstm2d_backward(self, *args: Any) -> tuple[Tensor | None, ...]:
        return pooled_gate.backward(*args)


def _state_size(input: Tensor, weight_ih: Tensor, options: ConvLSTMOptions) -> tuple[int, int]:
    kernel_size = (weight_ih.size(2), weight_ih.size(3))
    return conv_output_size(
        (input.size(3), input.size(4)), kernel_size, options.stride, options.padding, options.dilation
    )


def _sizes(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    peephole: Tensor | None,
    size: tuple[int, int],
    options: ConvLSTMOptions,
    transformed: winograd.Choice,
) -> list[int]:
    """All numbers of a call in the order in which csrc/cpu/conv_lstm2d.cpp reads them."""
    o = options
    recurrent_padding = same_padding((weight_hh.size(2), weight_hh.size(3)), o.recurrent_dilation)
    return [
        *input.shape[:3], weight_ih.size(0) // 4, o.groups,
        DTYPES[input.dtype], GATE_ACTIVATIONS[o.gate_activation], o.reverse,
        peephole is not None and peephole.dim() == 4, torch.get_num_threads(), PADDING_MODES[o.padding_mode],
        *input.shape[3:], *size, *weight_ih.shape[2:], *o.stride, o.padding[0], o.padding[2], *o.dilation,
        *size, *size, *weight_hh.shape[2:], 1, 1, recurrent_padding[0], recurrent_padding[2], *o.recurrent_dilation,
        *transformed,
    ]  # fmt: skip
