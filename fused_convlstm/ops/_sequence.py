"""What the operators share: one forward and one backward operator per cell, from a description of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import registry
from ..backends.call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions
from .layout import empty_frames_like, empty_state_like

_library = torch.library.Library("fused_convlstm", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

# In the order of the fields of ConvLSTMOptions.
_OPTIONS = (
    "int[2] stride, int[4] padding, int[2] dilation, int[2] recurrent_dilation, int groups, str padding_mode, "
    "str gate_activation, bool reverse"
)
_OPTION_COUNT = 8


def flatten_options(options: ConvLSTMOptions) -> tuple[Any, ...]:
    """The options as operator arguments."""
    o = options  # not dataclasses.astuple: it copies deeply, and takes as long as a small frame
    return (
        o.stride, o.padding, o.dilation, o.recurrent_dilation, o.groups, o.padding_mode, o.gate_activation, o.reverse
    )  # fmt: skip


def unflatten_options(arguments: Sequence[Any]) -> ConvLSTMOptions:
    """The inverse of :func:`flatten_options`."""
    stride, padding, dilation, recurrent_dilation, *rest = arguments
    return ConvLSTMOptions(tuple(stride), tuple(padding), tuple(dilation), tuple(recurrent_dilation), *rest)


def define_sequence_operator(
    name: str,
    tensors: str,  # schema of the tensor arguments: input, h_0, c_0, weights ..., step_flags last
    saved: int,  # how many tensors the forward keeps for the backward, after output, h_n and c_n
    fake: Callable[..., tuple[Tensor, ...]],  # (tensors, options, save) -> outputs
) -> Any:
    """Defines ``fused_convlstm::name`` and ``fused_convlstm::name_backward`` for CPU and CUDA.

    The backends have methods of the same two names.
    """
    count = tensors.count(",") + 1
    differentiable = count - 1  # all but step_flags
    options_end = count + _OPTION_COUNT

    def forward(*args: Any) -> tuple[Tensor, ...]:
        *_, save, backend = args
        options = unflatten_options(args[count:options_end])
        outputs: tuple[Tensor, ...] = getattr(registry.get(backend), name)(*args[:count], options, save)
        return outputs

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        return fake(args[:count], unflatten_options(args[count:options_end]), args[-2])

    def backward(*args: Any) -> tuple[Tensor, ...]:
        *rest, needs, backend = args
        options = unflatten_options(rest[-_OPTION_COUNT:])
        tensors = rest[:-_OPTION_COUNT]
        # What hooks on saved tensors gave back may have other strides.
        kept = [tensor.contiguous() for tensor in tensors[-saved:]]
        grads = getattr(registry.get(backend), f"{name}_backward")(*tensors[:-saved], *kept, options, needs)
        # An operator cannot return None: absent gradients become empty tensors.
        return tuple(args[3].new_empty((0,)) if grad is None else grad for grad in grads)

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        inputs, needs = args[3 : 3 + differentiable], args[-2]
        return tuple(
            empty_gradient(k, tensor, args[3]) if needed and tensor is not None else args[3].new_empty((0,))
            for k, (tensor, needed) in enumerate(zip(inputs, needs, strict=True))
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:count], output[0], *output[3:])
        ctx.options = inputs[count:options_end]
        ctx.save = inputs[-2]
        ctx.backend = inputs[-1]
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        *inputs, output = ctx.saved_tensors[: count + 1]
        kept = ctx.saved_tensors[count + 1 :]
        if ctx.save == SAVE_NOTHING:
            # `save` was decided when no gradient was wanted: a program exported under no_grad, vmap over weights that
            # are frozen.
            output, _, _, *kept = forward_operator(*inputs, *ctx.options, SAVE_GATES, ctx.backend)
        given = [
            bool(need) and tensor is not None
            for need, tensor in zip(ctx.needs_input_grad[:differentiable], inputs[:differentiable], strict=True)
        ]
        results = backward_operator(*grads[:3], *inputs, output, *kept, *ctx.options, given, ctx.backend)
        absent = (None,) * (_OPTION_COUNT + 3)  # step_flags, options, save, backend
        return (*(grad if g else None for grad, g in zip(results, given, strict=True)), *absent)

    forward_operator = _define(
        f"{name}({tensors}, {_OPTIONS}, str save, str backend) -> ({_list(3 + saved)})",
        forward,
        forward_fake,
    )
    extra = ", ".join(f"Tensor saved_{k}" for k in range(saved))
    backward_operator = _define(
        f"{name}_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {tensors}, Tensor output, {extra}, "
        f"{_OPTIONS}, bool[] needs, str backend) -> ({_list(differentiable)})",
        backward,
        backward_fake,
    )
    torch.library.register_autograd(f"fused_convlstm::{name}", autograd, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"fused_convlstm::{name}_backward", _raise_on_double_backward, lib=_library)
    return forward_operator


def empty_gradient(index: int, tensor: Tensor, input: Tensor) -> Tensor:
    """Uninitialised gradient of the operator's argument number ``index``: frames and states in the layout of
    ``input``, weights contiguous."""
    if index == 0:
        return empty_frames_like(input, tensor.size(2), tensor.size(3), tensor.size(4))
    if index <= 2:
        return empty_state_like(input, tensor.size(1), tensor.size(2), tensor.size(3), tensor.dtype)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"fused_convlstm::{name}", fake, lib=_library)
    return getattr(torch.ops.fused_convlstm, name)


def _list(count: int) -> str:
    return ", ".join(["Tensor"] * count)


def _raise_on_double_backward(*_: Any) -> None:
    raise RuntimeError(
        "the fused backward of a convolutional LSTM cannot be differentiated again; "
        'use backend="reference" for gradients of gradients'
    )
