"""The pooled-gate cell on the C++ kernels for CPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops._sequence import empty_gradient
from ...ops.layout import empty_frames_like, empty_state_like
from ..call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions, conv_output_size, same_padding, state_dtype
from .arguments import DTYPES, GATE_ACTIVATIONS, PADDING_MODES, view

# In the order of the operator's arguments.
_WEIGHTS = (
    "gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh", "pointwise_ih", "pointwise_hh",
    "bias",
)  # fmt: skip


def _arguments(
    input: Tensor,  # (T, B, Cin, H, W)
    h_0: Tensor | None,  # (B, C, Ho, Wo)
    c_0: Tensor | None,
    weights: Mapping[str, Tensor | None],  # by the names of _WEIGHTS
    step_flags: Tensor | None,  # (T, B)
    options: ConvLSTMOptions,
    state_size: tuple[int, int],
) -> dict[str, Any]:
    """What forward and backward have in common."""
    kernels = {name: tensor.shape for name, tensor in weights.items() if tensor is not None}
    recurrent_kernel_size = (kernels["depthwise_hh"][2], kernels["depthwise_hh"][3])
    return {
        "dtype": DTYPES[input.dtype],
        "input_shape": tuple(input.shape),
        "state_shape": (kernels["pointwise_ih"][0], *state_size),
        "kernel_size": tuple(kernels["depthwise_ih"][2:]),
        "recurrent_kernel_size": recurrent_kernel_size,
        "stride": options.stride,
        "padding": options.padding,
        "dilation": options.dilation,
        "recurrent_padding": same_padding(recurrent_kernel_size, options.recurrent_dilation),
        "recurrent_dilation": options.recurrent_dilation,
        "padding_mode": PADDING_MODES[options.padding_mode],
        "gate_activation": GATE_ACTIVATIONS[options.gate_activation],
        "reverse": options.reverse,
        "threads": torch.get_num_threads(),
        "step_flags": view(step_flags),
        "input": view(input),
        "h_0": view(h_0),
        "c_0": view(c_0),
        **{name: view(weight) for name, weight in weights.items()},
    }


def _contiguous(tensors: Sequence[Tensor | None]) -> tuple[dict[str, Tensor | None], Tensor | None]:
    """Weights by name, and step flags, from (weights ..., step_flags). All are small."""
    *weights, step_flags = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    return dict(zip(_WEIGHTS, weights, strict=True)), step_flags


def forward(
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *rest: Any,  # weights, step_flags, options, save
) -> tuple[Tensor, ...]:
    """See :meth:`Backend.pooled_gate_conv_lstm2d`."""
    from ... import _cpu

    *tensors, options, save = rest
    weights, step_flags = _contiguous(tensors)
    steps, batch, _, height, width = input.shape
    channels, kernel_size = tensors[5].size(0), tuple(tensors[3].shape[2:])
    state_size = conv_output_size((height, width), kernel_size, options.stride, options.padding, options.dilation)
    frames = (steps, batch, *state_size, channels)
    dtype = state_dtype(input.dtype)
    output = empty_frames_like(input, channels, *state_size)
    h_n = empty_state_like(input, channels, *state_size, input.dtype)
    c_n = empty_state_like(input, channels, *state_size, dtype)
    gates = input.new_empty((steps, batch, 3 * channels) if save != SAVE_NOTHING else (0,), dtype=dtype)
    candidate = input.new_empty(frames if save == SAVE_GATES else (0,))
    cells = input.new_empty(frames if save != SAVE_NOTHING else (0,))
    _cpu.pooled_gate_forward(
        **_arguments(input, h_0, c_0, weights, step_flags, options, state_size),
        output=view(output),
        h_n=view(h_n),
        c_n=view(c_n),
        gates=view(gates) if save != SAVE_NOTHING else None,
        candidate=view(candidate) if save == SAVE_GATES else None,
        cells=view(cells) if save != SAVE_NOTHING else None,
    )
    return output, h_n, c_n, gates, candidate, cells


def backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    *rest: Any,  # weights, step_flags, output, gates, candidate, cells, options, needs
) -> tuple[Tensor | None, ...]:
    """See :meth:`Backend.pooled_gate_conv_lstm2d_backward`."""
    from ... import _cpu

    *tensors, output, gates, candidate, cells, options, needs = rest
    weights, step_flags = _contiguous(tensors)
    inputs = {"input": input, "h_0": h_0, "c_0": c_0, **weights}
    grads = {
        name: empty_gradient(k, tensor, input) if needed and tensor is not None else None
        for k, ((name, tensor), needed) in enumerate(zip(inputs.items(), needs, strict=True))
    }
    steps, batch, in_channels, _, _ = input.shape
    channels = output.size(2)
    # The gradients of the gate weights are sums over steps and samples of products of these.
    grad_gates = gates.new_zeros((steps * batch, 3 * channels))
    pooled_x = gates.new_zeros((steps * batch, in_channels))
    pooled_h = gates.new_zeros((steps * batch, channels))
    in_kernel = ("input", "h_0", "c_0", "depthwise_ih", "depthwise_hh", "pointwise_ih", "pointwise_hh", "bias")
    _cpu.pooled_gate_backward(
        **_arguments(input, h_0, c_0, weights, step_flags, options, (output.size(3), output.size(4))),
        output=view(output),
        gates=view(gates),
        candidate=view(candidate) if candidate.dim() > 1 else None,
        cells=view(cells),
        grad_output=view(grad_output),
        grad_h_n=view(grad_h_n),
        grad_c_n=view(grad_c_n),
        grad_gates=view(grad_gates),
        pooled_x=view(pooled_x),
        pooled_h=view(pooled_h),
        **{f"grad_{name}": view(grads[name]) for name in in_kernel},
    )
    for name, pooled in (("gate_weight_ih", pooled_x), ("gate_weight_hh", pooled_h)):
        grad = grads[name]
        if grad is not None:
            grad.copy_(grad_gates.t() @ pooled)
    grad = grads["gate_bias"]
    if grad is not None:
        grad.copy_(grad_gates.sum(0))
    return tuple(grads.values())
