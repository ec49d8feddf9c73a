"""Stateless functions: a sequence, or a step, of each cell.

Shapes: T steps, B batch, Cin and C input and hidden channels, H x W input size, Ho x Wo state size.
Bad arguments raise a ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from . import ops, reference
from .backends import registry
from .backends.call import (
    FLAG_PAST_END,
    FLAG_RESET,
    SAVE_CELLS,
    SAVE_GATES,
    SAVE_NOTHING,
    Call,
    ConvLSTMOptions,
    conv_output_size,
    same_padding,
    state_dtype,
)
from .ops._sequence import flatten_options

State = tuple[Tensor, Tensor]
Size = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]

POOLED_GATE_WEIGHTS = (
    "gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh", "pointwise_ih", "pointwise_hh",
    "bias",
)  # fmt: skip
PADDING_MODES = ("zeros", "circular", "replicate", "reflect")


def conv_lstm2d(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    hx: State | None = None,
    *,
    peephole: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    recurrent_dilation: Size | None = None,
    groups: int = 1,
    padding_mode: str = "zeros",
    gate_activation: str = "sigmoid",
    reverse: bool = False,
    recompute_gates: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """A convolutional LSTM over a sequence: one layer, one direction.

    Courtney & Sreenivas, eq. (1); with ``peephole``, Shi et al. 2015, eq. (3). Gate order i, f, g, o.

    Args:
        input: (T, B, Cin, H, W).
        weight_ih: (4 * C, Cin / groups, kh, kw).
        weight_hh: (4 * C, C / groups, rh, rw). This convolution keeps the size of the state.
        bias: (4 * C,).
        hx: (h_0, c_0), each (B, C, Ho, Wo); zeros if None.
        peephole: (3, C) or (3, C, Ho, Wo), order i, f, o.
        lengths: (B,), how many steps of each sample are valid, 0 to T.
        reset: (T, B) boolean; where True, the state of that sample is zeroed before that step.
        stride: of the input convolution.
        padding: of the input convolution: "same" (dilation * (kernel - 1) in all, half of it on each side, an odd
            one more at the end), "valid", a number, (vertical, horizontal) or ((top, bottom), (left, right)).
        dilation: of the input convolution.
        recurrent_dilation: of the recurrent convolution; that of the input convolution if None.
        groups: of each gate's two convolutions.
        padding_mode: "zeros", "circular", "replicate" or "reflect", for both convolutions.
        gate_activation: "sigmoid", "hard_sigmoid" (relu6(x + 3) / 6) or "hard_sigmoid_keras2" (clip(0.2 x + 0.5)).
        reverse: run from the last valid step to the first.
        recompute_gates: compute the gates again in backward rather than keep them.
        backend: "auto", "reference" or the name of a backend.

    Returns:
        output (T, B, C, Ho, Wo), zero past a sample's length, in the memory layout of ``input``; and (h_n, c_n), each
        (B, C, Ho, Wo). For half-precision inputs c_n is float32, and c_0 may be.

    Raises:
        ValueError: an argument does not fit.
        BackendError: ``backend`` cannot serve this call.
    """
    if input.dim() != 5:
        raise ValueError(f"input: expected 5 dimensions (T, B, Cin, H, W), got shape {tuple(input.shape)}")
    options = make_options(
        (weight_ih, "weight_ih"), stride, padding, dilation, recurrent_dilation, groups, padding_mode,
        gate_activation, reverse,
    )  # fmt: skip
    flags = make_step_flags(input, lengths, reset)
    return conv_lstm2d_sequence(
        input, hx, weight_ih, weight_hh, bias, peephole, flags, options, recompute_gates, backend
    )


def pooled_gate_conv_lstm2d(
    input: Tensor,
    gate_weight_ih: Tensor,
    gate_weight_hh: Tensor,
    depthwise_ih: Tensor,
    depthwise_hh: Tensor,
    pointwise_ih: Tensor,
    pointwise_hh: Tensor,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    hx: State | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Size = 1,
    recurrent_dilation: Size | None = None,
    padding_mode: str = "zeros",
    gate_activation: str = "sigmoid",
    reverse: bool = False,
    recompute_gates: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """The pooled-gate ConvLSTM, "variant (a)", over a sequence: one layer, one direction.

    Zhang et al., "Attention in Convolutional LSTM for Gesture Recognition", eq. (8) to (16): the gates are vectors
    computed from globally pooled x and h; the candidate is a sum of two depthwise-separable convolutions.

    Args:
        input: (T, B, Cin, H, W).
        gate_weight_ih: (3 * C, Cin), gate order i, f, o.
        gate_weight_hh: (3 * C, C).
        depthwise_ih: (Cin, 1, kh, kw).
        depthwise_hh: (C, 1, rh, rw). This convolution keeps the size of the state.
        pointwise_ih: (C, Cin).
        pointwise_hh: (C, C).
        gate_bias: (3 * C,).
        bias: (C,), of the candidate.

    The other arguments, the results and the errors are those of :func:`conv_lstm2d`.
    """
    if input.dim() != 5:
        raise ValueError(f"input: expected 5 dimensions (T, B, Cin, H, W), got shape {tuple(input.shape)}")
    options = make_options(
        (depthwise_ih, "depthwise_ih"), stride, padding, dilation, recurrent_dilation, 1, padding_mode,
        gate_activation, reverse,
    )  # fmt: skip
    flags = make_step_flags(input, lengths, reset)
    weights = (
        gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias,
    )  # fmt: skip
    return pooled_gate_conv_lstm2d_sequence(input, hx, weights, flags, options, recompute_gates, backend)


def conv_lstm2d_cell(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    hx: State | None = None,
    **options: Any,
) -> State:
    """One step of :func:`conv_lstm2d`: ``input`` is (B, Cin, H, W); returns (h, c), each (B, C, Ho, Wo)."""
    _check_cell_input(input)
    _, state = conv_lstm2d(input[None], weight_ih, weight_hh, bias, hx, **options)
    return state


def pooled_gate_conv_lstm2d_cell(
    input: Tensor,
    gate_weight_ih: Tensor,
    gate_weight_hh: Tensor,
    depthwise_ih: Tensor,
    depthwise_hh: Tensor,
    pointwise_ih: Tensor,
    pointwise_hh: Tensor,
    gate_bias: Tensor | None = None,
    bias: Tensor | None = None,
    hx: State | None = None,
    **options: Any,
) -> State:
    """One step of :func:`pooled_gate_conv_lstm2d`: ``input`` is (B, Cin, H, W); returns (h, c), each
    (B, C, Ho, Wo)."""
    _check_cell_input(input)
    weights = (gate_weight_ih, gate_weight_hh, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh)
    _, state = pooled_gate_conv_lstm2d(input[None], *weights, gate_bias, bias, hx, **options)
    return state


# --- what modules and functions share ------------------------------------------------------------------------------


def pair(value: Size, name: str, minimum: int = 1) -> tuple[int, int]:
    """An int or a pair of ints as a pair."""
    values = tuple(value) if isinstance(value, Iterable) else (value, value)
    if len(values) != 2 or not all(is_int(v, minimum) for v in values):
        raise ValueError(f"{name}: expected an int or two ints, at least {minimum}, got {value!r}")
    return int(values[0]), int(values[1])


def is_int(value: object, minimum: int) -> bool:
    """Whether ``value`` is an integer, of NumPy too, and at least ``minimum``."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum


def resolve_padding(
    padding: Padding, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Any form of the ``padding`` argument as (top, bottom, left, right)."""
    if isinstance(padding, str):
        if padding == "same":
            return same_padding(kernel_size, dilation)
        if padding == "valid":
            return 0, 0, 0, 0
        raise ValueError(f"padding: expected 'same', 'valid' or numbers, got {padding!r}")
    sides: tuple[Any, ...] = tuple(padding) if isinstance(padding, Iterable) else (padding, padding)
    if len(sides) != 2:
        raise ValueError(f"padding: expected a number, two numbers or two pairs of numbers, got {padding!r}")
    top, bottom = pair(sides[0], "padding", 0)
    left, right = pair(sides[1], "padding", 0)
    return top, bottom, left, right


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def make_options(
    kernel: tuple[Tensor, str],
    stride: Size,
    padding: Padding,
    dilation: Size,
    recurrent_dilation: Size | None,
    groups: int,
    padding_mode: str,
    gate_activation: str,
    reverse: bool,
) -> ConvLSTMOptions:
    """Checked options of a call; ``kernel`` is the input convolution's weight and its name."""
    weight, name = kernel
    if weight.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions, got shape {tuple(weight.shape)}")
    if not is_int(groups, 1):
        raise ValueError(f"groups: expected an int of at least 1, got {groups!r}")
    check_choice(padding_mode, "padding_mode", PADDING_MODES)
    check_choice(gate_activation, "gate_activation", tuple(reference.GATE_ACTIVATIONS))
    dilation = pair(dilation, "dilation")
    return ConvLSTMOptions(
        stride=pair(stride, "stride"),
        padding=resolve_padding(padding, (weight.size(2), weight.size(3)), dilation),
        dilation=dilation,
        recurrent_dilation=dilation if recurrent_dilation is None else pair(recurrent_dilation, "recurrent_dilation"),
        groups=int(groups),
        padding_mode=padding_mode,
        gate_activation=gate_activation,
        reverse=reverse,
    )


def make_step_flags(
    input: Tensor,  # (T, B, ...)
    lengths: Tensor | Sequence[int] | None,  # (B,)
    reset: Tensor | None,  # (T, B)
) -> Tensor | None:  # (T, B) uint8
    """``lengths`` and ``reset`` as one byte a step and sample; None if neither is given."""
    steps, batch = input.size(0), input.size(1)
    flags = None
    if reset is not None:
        if reset.dtype != torch.bool or tuple(reset.shape) != (steps, batch):
            raise ValueError(
                f"reset: expected a boolean tensor of shape (T, B) = {(steps, batch)}, "
                f"got {reset.dtype} of shape {tuple(reset.shape)}"
            )
        flags = reset.to(input.device, torch.uint8) * FLAG_RESET
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            lengths = torch.tensor(lengths, dtype=None if len(lengths) else torch.int64, device="cpu")
        if lengths.dtype not in (torch.int64, torch.int32) or tuple(lengths.shape) != (batch,):
            raise ValueError(
                f"lengths: expected {batch} integers, one a sample, got {lengths.dtype} of shape {tuple(lengths.shape)}"
            )
        # On a GPU, looking at the values would stop the stream; a fake tensor has none.
        known = lengths.device.type == "cpu" and not isinstance(lengths, FakeTensor)
        if not torch.compiler.is_compiling() and known and batch > 0:
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > steps:
                raise ValueError(f"lengths: expected values from 0 to T = {steps}, got {low} to {high}")
        past_end = torch.arange(steps, device=input.device)[:, None] >= lengths.to(input.device)
        keep = torch.zeros((), dtype=torch.uint8, device=input.device) if flags is None else flags
        flags = torch.where(past_end, torch.full_like(keep, FLAG_PAST_END), keep)
    return flags


def conv_lstm2d_sequence(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    step_flags: Tensor | None,
    options: ConvLSTMOptions,
    recompute_gates: bool,
    backend: str | None,
) -> tuple[Tensor, State]:
    """:func:`conv_lstm2d` with its options checked and its step flags made."""
    in_channels, groups = input.size(2), options.groups
    channels = weight_ih.size(0) // 4
    if in_channels % groups or channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the input channels ({in_channels}) and the hidden channels ({channels}), "
            f"got {groups}"
        )
    if weight_ih.size(0) != 4 * channels or weight_ih.size(1) != in_channels // groups:
        raise ValueError(
            f"weight_ih: expected shape (4 * C, {in_channels // groups}, kh, kw) for input with {in_channels} channels "
            f"and groups {groups}, got {tuple(weight_ih.shape)}"
        )
    if weight_hh.dim() != 4 or weight_hh.size(0) != 4 * channels or weight_hh.size(1) != channels // groups:
        raise ValueError(
            f"weight_hh: expected shape ({4 * channels}, {channels // groups}, rh, rw), got {tuple(weight_hh.shape)}"
        )
    size = _checked_state_size(input, weight_ih, weight_hh, options)
    _check_shape(bias, "bias", (4 * channels,))
    if peephole is not None and peephole.dim() != 2:
        _check_shape(peephole, "peephole", (3, channels, *size))
    else:
        _check_shape(peephole, "peephole", (3, channels))
    return _run(
        "conv_lstm2d",
        (input, hx, weight_ih, weight_hh, bias, peephole),
        ("weight_ih", "weight_hh", "bias", "peephole"),
        step_flags,
        options,
        recompute_gates,
        backend,
        channels,
        size,
        (weight_ih, weight_hh),
        "none" if peephole is None else "pixel" if peephole.dim() == 4 else "channel",
    )


def pooled_gate_conv_lstm2d_sequence(
    input: Tensor,
    hx: State | None,
    weights: Sequence[Any],  # in the order of POOLED_GATE_WEIGHTS
    step_flags: Tensor | None,
    options: ConvLSTMOptions,
    recompute_gates: bool,
    backend: str | None,
) -> tuple[Tensor, State]:
    """:func:`pooled_gate_conv_lstm2d` with its options checked and its step flags made."""
    (gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias) = weights
    in_channels, channels = input.size(2), pointwise_hh.size(0) if pointwise_hh.dim() else 0
    _check_shape(pointwise_ih, "pointwise_ih", (channels, in_channels))
    _check_shape(pointwise_hh, "pointwise_hh", (channels, channels))
    _check_shape(gate_weight_ih, "gate_weight_ih", (3 * channels, in_channels))
    _check_shape(gate_weight_hh, "gate_weight_hh", (3 * channels, channels))
    _check_shape(gate_bias, "gate_bias", (3 * channels,))
    _check_shape(bias, "bias", (channels,))
    for name, weight, count in (("depthwise_ih", depthwise_ih, in_channels), ("depthwise_hh", depthwise_hh, channels)):
        if weight.dim() != 4 or weight.size(0) != count or weight.size(1) != 1:
            raise ValueError(f"{name}: expected shape ({count}, 1, kh, kw), got {tuple(weight.shape)}")
    size = _checked_state_size(input, depthwise_ih, depthwise_hh, options)
    return _run(
        "pooled_gate_conv_lstm2d",
        (input, hx, *weights),
        POOLED_GATE_WEIGHTS,
        step_flags,
        options,
        recompute_gates,
        backend,
        channels,
        size,
        (depthwise_ih, depthwise_hh),
        "none",
    )


def _run(
    cell: str,
    tensors: tuple[Any, ...],  # input, hx, weights ...
    weight_names: tuple[str, ...],
    step_flags: Tensor | None,
    options: ConvLSTMOptions,
    recompute_gates: bool,
    backend: str | None,
    channels: int,
    size: tuple[int, int],
    kernels: tuple[Tensor, Tensor],  # of the input and of the recurrent convolution
    peephole: str,
) -> tuple[Tensor, State]:
    """Checks what both cells have in common, chooses the backend and runs it."""
    input, hx, *weights = tensors
    input, hx, weights = autocast_call(input, hx, weights)
    check_weights(weight_names, weights, input)
    h_0, c_0 = checked_state(hx, input, channels, size)
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (input, h_0, c_0, *weights)
    )
    call = Call(
        cell=cell,
        device=input.device,
        dtype=input.dtype,
        steps=input.size(0),
        batch=input.size(1),
        in_channels=input.size(2),
        hidden_channels=channels,
        input_size=(input.size(3), input.size(4)),
        state_size=size,
        kernel_size=(kernels[0].size(2), kernels[0].size(3)),
        recurrent_kernel_size=(kernels[1].size(2), kernels[1].size(3)),
        options=options,
        peephole=peephole,
        step_flags=step_flags is not None,
        save=SAVE_NOTHING if not needs_grad else SAVE_CELLS if recompute_gates else SAVE_GATES,
        transformed=not torch.compiler.is_compiling() and _transformed((input, h_0, c_0, *weights)),
    )
    chosen = registry.choose(call, backend)
    if chosen == registry.REFERENCE:
        zeros = input.new_zeros((input.size(1), channels, *size))
        h_0 = zeros if h_0 is None else h_0
        c_0 = zeros.to(state_dtype(input.dtype)) if c_0 is None else c_0
        function: Callable[..., tuple[Tensor, Tensor, Tensor]] = getattr(reference, cell)
        with without_autocast(input.device.type):
            output, h_n, c_n = function(input, h_0, c_0, *weights, step_flags, options)
        return output, (h_n, c_n)
    operator = getattr(ops, cell)
    results = operator(input, h_0, c_0, *weights, step_flags, *flatten_options(options), call.save, chosen)
    return results[0], (results[1], results[2])


def _transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether the operators' own backward is not enough. Batches of torch.vmap are served, one sample after another."""
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    if any(interpreter.key() != torch._C._functorch.TransformType.Vmap for interpreter in interpreters):
        return True
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


# Asked once: torch.compile before 2.13 cannot trace the question.
_WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")))


def autocast_call(input: Tensor, hx: State | None, weights: list[Any]) -> tuple[Tensor, State | None, list[Any]]:
    """Under autocast, everything but the cell state in autocast's type, as for ``nn.LSTM``."""
    device = input.device.type
    if device not in _WITH_AUTOCAST or not torch.is_autocast_enabled(device):
        return input, hx, weights
    if input.dtype == torch.float64:
        return input, hx, weights
    dtype = torch.get_autocast_dtype(device)
    weights = [None if weight is None else weight.to(dtype) for weight in weights]
    return input.to(dtype), None if hx is None else (hx[0].to(dtype), hx[1]), weights


def without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if device in _WITH_AUTOCAST else nullcontext()


def check_weights(names: Sequence[str], weights: Sequence[Tensor | None], input: Tensor) -> None:
    for name, weight in zip(names, weights, strict=True):
        if weight is not None and (weight.dtype != input.dtype or weight.device != input.device):
            raise ValueError(
                f"{name}: expected {input.dtype} on {input.device} like input, got {weight.dtype} on {weight.device}"
            )


def _check_shape(tensor: Tensor | None, name: str, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _check_cell_input(input: Tensor) -> None:
    if input.dim() != 4:
        raise ValueError(f"input: expected 4 dimensions (B, Cin, H, W), got shape {tuple(input.shape)}")


def _checked_state_size(
    input: Tensor, kernel: Tensor, recurrent_kernel: Tensor, options: ConvLSTMOptions
) -> tuple[int, int]:
    """Height and width of the state; checks that input and padding make sense together."""
    if not input.dtype.is_floating_point:
        raise ValueError(f"input: expected a floating-point type, got {input.dtype}")
    if input.size(0) < 1:
        raise ValueError(f"input: expected at least one step, got shape {tuple(input.shape)}")
    if 0 in input.shape[2:]:
        raise ValueError(f"input: expected frames with channels and pixels, got shape {tuple(input.shape)}")
    for name, weight in (("input", kernel), ("recurrent", recurrent_kernel)):
        if 0 in weight.shape:
            raise ValueError(f"{name} convolution's weight: expected no size of 0, got {tuple(weight.shape)}")
    input_size = (input.size(3), input.size(4))
    kernel_size = (kernel.size(2), kernel.size(3))
    size = conv_output_size(input_size, kernel_size, options.stride, options.padding, options.dilation)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(
            f"input: expected frames no smaller than the kernel {kernel_size} with dilation {options.dilation} and "
            f"padding (top, bottom, left, right) {options.padding}, got {input_size}"
        )
    recurrent_padding = same_padding((recurrent_kernel.size(2), recurrent_kernel.size(3)), options.recurrent_dilation)
    if options.padding_mode in ("circular", "reflect"):
        less = 1 if options.padding_mode == "reflect" else 0
        for what, frame, pad in (("input", input_size, options.padding), ("state", size, recurrent_padding)):
            if max(pad[:2]) > frame[0] - less or max(pad[2:]) > frame[1] - less:
                raise ValueError(
                    f"padding_mode: {options.padding_mode!r} padding (top, bottom, left, right) {pad} is too large for "
                    f"{what} frames of {frame}"
                )
    return size


def checked_state(
    hx: State | None, input: Tensor, channels: int, size: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None]:
    if hx is None:
        return None, None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise ValueError(f"hx: expected a pair (h_0, c_0), got {type(hx).__name__}")
    h_0, c_0 = hx
    for name, state in (("h_0", h_0), ("c_0", c_0)):
        if not isinstance(state, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(state).__name__}")
    shape = (input.size(1), channels, *size)
    _check_shape(h_0, "h_0", shape)
    _check_shape(c_0, "c_0", shape)
    dtype = state_dtype(input.dtype)
    if h_0.dtype != input.dtype or h_0.device != input.device:
        raise ValueError(f"h_0: expected {input.dtype} on {input.device} like input, got {h_0.dtype} on {h_0.device}")
    if c_0.dtype not in (input.dtype, dtype) or c_0.device != input.device:
        raise ValueError(f"c_0: expected {dtype} on {input.device}, got {c_0.dtype} on {c_0.device}")
    return h_0, c_0.to(dtype)
