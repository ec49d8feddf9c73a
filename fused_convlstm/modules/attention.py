"""ConvLSTMs with attention: what all of them share, and variants (b) to (d) of Zhang et al.

What runs fused: the attention of a step depends on the state before it, so these layers go step by step. Variant (b)
runs each step on A o x through the operator of variant (a), and variant (d) takes the cell state from that operator and
puts its own output gate on it. Variant (c) changes the input gate inside the cell: it is plain PyTorch, and so is every
attention map. ``explain`` says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import reference_attention as reference
from ..backends import registry
from ..backends.call import ConvLSTMOptions, state_dtype
from ..functional import (
    Size,
    State,
    autocast_call,
    check_weights,
    checked_state,
    pooled_gate_conv_lstm2d_sequence,
    without_autocast,
)
from ..reference import sequence
from ..reference_attention import VariantWeights
from ._recurrent import ConvolutionArguments, RecurrentConv2d
from .initialization import glorot_per_gate_, orthogonal_per_gate_

Shapes = dict[str, tuple[int, ...]]


class AttentionConv2d(RecurrentConv2d):
    """What the layers with attention share. A subclass has ``_shapes`` and ``_cell``."""

    plain = ""  # which part runs in plain PyTorch, for `explain`
    _state_weight = "pointwise_hh"  # the weight whose second dimension is C

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        kernel_size: Size,
        num_layers: int = 1,
        *,
        bias: bool = True,
        gate_activation: str = "sigmoid",
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        merge_mode: str = "concat",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        convolution = ConvolutionArguments(kernel_size, None, 1, "same", 1, None, 1, "zeros", gate_activation)
        super().__init__(
            in_channels, hidden_channels, num_layers, convolution, bias, batch_first, dropout, bidirectional,
            merge_mode, False, backend,
        )  # fmt: skip
        for layer, channels in enumerate(self.hidden_channels):
            shapes = self._shapes(self._layer_in_channels(layer), channels)
            for direction in ("", "_reverse") if bidirectional else ("",):
                for name, shape in shapes.items():
                    parameter = None
                    if bias or not name.endswith("bias"):
                        parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{direction}", parameter)
        self.reset_parameters()

    @abstractmethod
    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        """Names and shapes of a layer's parameters, in the order in which ``_cell`` takes them."""

    @abstractmethod
    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: Any, options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step: h, c and the attention."""

    @abstractmethod
    def _prepare(self, weights: list[Any]) -> Any:
        """What ``_cell`` gets as its weights, from the parameters in the order of ``_shapes``; made once a sequence."""

    def reset_parameters(self) -> None:
        for suffix in self._suffixes():
            for name in self._shapes(1, 1):
                parameter = getattr(self, f"{name}{suffix}")
                if parameter is not None:
                    self._initialize(name, parameter)

    def _initialize(self, name: str, parameter: Tensor) -> None:
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "depthwise" in name:
            # A depthwise kernel has one input and one output channel: Glorot's bound counts its taps alone.
            bound = (3.0 / (parameter.size(2) * parameter.size(3))) ** 0.5
            nn.init.uniform_(parameter, -bound, bound)
        elif name == "pointwise_hh":
            orthogonal_per_gate_(parameter, 1)
        else:
            nn.init.xavier_uniform_(parameter)

    def _state_size(self, input: Tensor) -> tuple[int, ...]:
        return input.size(3), input.size(4)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Any, Any] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the sequence: arguments and results of :meth:`ConvLSTM2d.forward`.

        With ``return_attention``, a third result: a tuple with the attention of each layer and direction, laid out
        like a tensor ``input``, (T, B, K, H, W) with K = 1 for attention on the input and K = C for a gate; zero past a
        sample's length. For a ``PackedSequence`` it is padded.
        """
        if not return_attention:
            return self._forward(input, hx, lengths, reset, {})
        maps: list[Tensor] = []
        output, state = self._forward(input, hx, lengths, reset, {"maps": maps})
        if not isinstance(input, PackedSequence) and input.dim() == 4:
            maps = [attention.squeeze(1) for attention in maps]
        elif self.batch_first:
            maps = [attention.transpose(0, 1) for attention in maps]
        return output, state, tuple(maps)

    def _run_layer(
        self,
        suffix: str,
        input: Tensor,
        hx: State | None,
        step_flags: Tensor | None,
        options: ConvLSTMOptions,
        maps: list[Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        names = list(self._shapes(1, 1))
        weights = [getattr(self, f"{name}{suffix}") for name in names]
        input, hx, weights = autocast_call(input, hx, weights)
        check_weights([f"{name}{suffix}" for name in names], weights, input)
        channels = weights[names.index(self._state_weight)].size(1)
        size = self._state_size(input)
        h, c = checked_state(hx, input, channels, size)
        if h is None or c is None:
            h = input.new_zeros((input.size(1), channels, *size))
            c = h.to(state_dtype(input.dtype))
        registry.note(f"{type(self).__name__}: {self.plain} in plain PyTorch")
        with without_autocast(input.device.type):
            arguments = (self._prepare(weights), options)
            output, h_n, c_n, attention = sequence(self._cell, input, h, c, step_flags, options.reverse, arguments)
        if maps is not None:
            maps.append(attention)
        return output, (h_n, c_n)


class _Variant(AttentionConv2d):
    """Variants (b), (c) and (d)."""

    gates: str  # those that stay pooled, in order

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        kernel, gates = self.convolution.kernel_size, len(self.gates)
        return {
            "gate_weight_ih": (gates * channels, in_channels),
            "gate_weight_hh": (gates * channels, channels),
            "gate_bias": (gates * channels,),
            "depthwise_ih": (in_channels, 1, *kernel),
            "depthwise_hh": (channels, 1, *kernel),
            "pointwise_ih": (channels, in_channels),
            "pointwise_hh": (channels, channels),
            "bias": (channels,),
            "attention_depthwise_ih": (in_channels, 1, *kernel),
            "attention_depthwise_hh": (channels, 1, *kernel),
            "attention_pointwise_ih": (channels, in_channels),
            "attention_pointwise_hh": (channels, channels),
            "attention_bias": (channels,),
            "attention_depthwise": (channels, 1, *kernel),
            "attention_pointwise": (channels, channels),
        }

    def _initialize(self, name: str, parameter: Tensor) -> None:
        if name == "gate_weight_ih":
            glorot_per_gate_(parameter, len(self.gates))
        elif name == "gate_weight_hh":
            orthogonal_per_gate_(parameter, len(self.gates))
        elif name == "gate_bias":
            nn.init.zeros_(parameter)
            parameter.data.chunk(len(self.gates))[self.gates.index("f")].fill_(1.0)
        else:
            super()._initialize(name, parameter)

    def _prepare(self, weights: list[Any]) -> VariantWeights:
        return VariantWeights.of(weights)

    def _pooled_gate_step(
        self, x: Tensor, h: Tensor, c: Tensor, weights: VariantWeights, options: ConvLSTMOptions
    ) -> tuple[Tensor, State]:
        """A step of variant (a), by its operator."""
        return pooled_gate_conv_lstm2d_sequence(
            x[None], (h, c), weights.pooled_gate, None, options, False, self.backend
        )


class InputAttentionConvLSTM2d(_Variant):
    r"""Pooled-gate ConvLSTM with attention on its input: "variant (b)" of Zhang et al., eq. (17) to (20).

    .. math::
        A_t &= \operatorname{softmax}_{H, W}(W_z * \tanh(W_{xa} * x_t + W_{ha} * h_{t-1} + b_a)) \\
        \tilde x_t &= A_t \circ x_t

    and a step of :class:`PooledGateConvLSTM2d` on :math:`\tilde x_t`. W_xa and W_ha are depthwise-separable.
    Frames and state have one size: stride 1, "same" padding.

    Args:
        in_channels: channels of the input frames.
        hidden_channels: channels of the state, one number or one a layer.
        kernel_size: of all convolutions.
        num_layers: how many layers are stacked. The paper has attention in the first of two layers only; the second is
            a :class:`PooledGateConvLSTM2d`.
        bias, gate_activation, batch_first, dropout, bidirectional, merge_mode, backend, device, dtype: as for
            :class:`ConvLSTM2d`. The authors' code has ``gate_activation="hard_sigmoid_keras2"``.

    Parameters beside those of :class:`PooledGateConvLSTM2d` (k is the layer, ``_reverse`` the second direction):
        attention_depthwise_ih_l[k]: (Cin, 1, kh, kw). attention_depthwise_hh_l[k]: (C, 1, kh, kw).
        attention_pointwise_ih_l[k]: (C, Cin). attention_pointwise_hh_l[k]: (C, C). attention_bias_l[k]: (C,).
        attention_weight_l[k]: (1, C, kh, kw).
    """

    gates = "ifo"
    plain = "the attention map"

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        shapes = super()._shapes(in_channels, channels)
        del shapes["attention_depthwise"], shapes["attention_pointwise"]
        return {**shapes, "attention_weight": (1, channels, *self.convolution.kernel_size)}

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: VariantWeights, options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = reference.input_attention(x, h, weights)
        _, (h, c) = self._pooled_gate_step(attention * x, h, c, weights, options)
        return h, c, attention


class InputGateAttentionConvLSTM2d(_Variant):
    r"""Pooled-gate ConvLSTM whose input gate is attention: "variant (c)" of Zhang et al., eq. (21) to (24).

    .. math::
        z_t &= W_i * \tanh(W_{xi} * x_t + W_{hi} * h_{t-1} + b_i) \\
        i_t &= \exp(z_t - \max_{H, W} z_t)

    in place of the pooled input gate of :class:`PooledGateConvLSTM2d`. All three convolutions are depthwise-separable.
    No operator of this package computes this cell: it is plain PyTorch. The arguments are those of
    :class:`InputAttentionConvLSTM2d`.

    Parameters (k is the layer, ``_reverse`` the second direction), gate order f, o:
        gate_weight_ih_l[k]: (2 * C, Cin). gate_weight_hh_l[k]: (2 * C, C). gate_bias_l[k]: (2 * C,).
        depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias: of the candidate, as in variant (a).
        attention_depthwise_ih, ..., attention_bias: the same shapes, of the inner convolutions of the attention.
        attention_depthwise_l[k]: (C, 1, kh, kw). attention_pointwise_l[k]: (C, C).
    """

    gates = "fo"
    plain = "the whole cell"

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: VariantWeights, options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.input_gate_attention_conv_lstm2d_cell(x, h, c, weights, options)


class OutputGateAttentionConvLSTM2d(_Variant):
    r"""Pooled-gate ConvLSTM whose output gate is attention: "variant (d)" of Zhang et al.

    .. math::
        z_t &= W_o * \tanh(W_{xo} * x_t + W_{ho} * h_{t-1} + b_o) \\
        o_t &= \exp(z_t - \max_{H, W} z_t)

    in place of the pooled output gate of :class:`PooledGateConvLSTM2d`. All three convolutions are
    depthwise-separable. The arguments are those of :class:`InputAttentionConvLSTM2d`.

    Parameters: as for :class:`InputGateAttentionConvLSTM2d`, gate order i, f.
    """

    gates = "if"
    plain = "the output gate"

    def _prepare(self, weights: list[Any]) -> VariantWeights:
        # The operator has three gates. Its output gate is not used: c does not depend on it.
        gates = [None if w is None else torch.cat((w, torch.zeros_like(w[: w.size(0) // 2]))) for w in weights[:3]]
        return VariantWeights.of(gates + weights[3:])

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: VariantWeights, options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = reference.gate_attention(x, h, weights)
        _, (_, c) = self._pooled_gate_step(x, h, c, weights, options)
        return (attention * torch.tanh(c)).to(h.dtype), c, attention
