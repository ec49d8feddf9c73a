"""ConvLSTMs with attention: variants (b) to (d) of Zhang et al., ALSTM, ConvALSTM and motion attention.

What runs fused: the attention of a step depends on the state before it, so these layers go step by step. Variant (b)
and ConvALSTM run each step on A o x through the operator of variant (a), or of ConvLSTM; variant (d) takes the cell
state from the operator of variant (a) and puts its own output gate on it. With motion attention nothing waits for the
state, and both ConvLSTMs run whole sequences through the operator. Variant (c) changes the input gate inside the cell,
and ALSTM works on vectors: these two are plain PyTorch, and so is every attention map. ``explain`` says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import reference_attention as reference
from ..backends import registry
from ..backends.call import FLAG_PAST_END, FLAG_RESET, ConvLSTMOptions, state_dtype
from ..functional import (
    Size,
    State,
    autocast_call,
    check_weights,
    checked_state,
    conv_lstm2d_sequence,
    make_step_flags,
    pair,
    pooled_gate_conv_lstm2d_sequence,
)
from ..reference import sequence
from ._recurrent import ConvolutionArguments, RecurrentConv2d
from .conv_lstm2d import ConvLSTM2d
from .initialization import forget_gate_bias_, glorot_per_gate_, orthogonal_per_gate_

Shapes = dict[str, tuple[int, ...]]
_POOLED_GATE = 8  # how many of a variant's weights are those of variant (a)


class AttentionConv2d(RecurrentConv2d):
    """What the layers with attention share. A subclass has ``_shapes`` and ``_cell``."""

    plain = ""  # which part runs in plain PyTorch, for `explain`

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        kernel_size: Size,
        num_layers: int,
        bias: bool,
        gate_activation: str,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        merge_mode: str,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
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
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step: h, c and the attention."""

    def _prepare(self, weights: list[Any]) -> list[Any]:
        """What ``_cell`` gets as its weights, made once a sequence."""
        return weights

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
        channels = next(w for name, w in zip(names, weights, strict=True) if name == self._state_weight).size(1)
        size = self._state_size(input)
        h, c = checked_state(hx, input, channels, size)
        if h is None or c is None:
            h = input.new_zeros((input.size(1), channels, *size))
            c = h.to(state_dtype(input.dtype))
        registry.note(f"{type(self).__name__}: {self.plain} in plain PyTorch")
        with torch.autocast(input.device.type, enabled=False):
            arguments = (self._prepare(weights), options)
            output, h_n, c_n, attention = sequence(
                self._cell, input, h, c, step_flags, options.reverse, arguments
            )  # fmt: skip
        if maps is not None:
            maps.append(attention)
        return output, (h_n, c_n)

    _state_weight = "pointwise_hh"  # the weight whose second dimension is C


class _Variant(AttentionConv2d):
    """Variants (b), (c) and (d)."""

    gates: str  # those that stay pooled, in order

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
        super().__init__(
            in_channels, hidden_channels, kernel_size, num_layers, bias, gate_activation, batch_first, dropout,
            bidirectional, merge_mode, backend, device, dtype,
        )  # fmt: skip

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
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = reference.input_attention(x, h, *weights[_POOLED_GATE:])
        x = (attention * x).unsqueeze(0)
        pooled_gate = weights[:_POOLED_GATE]
        _, (h, c) = pooled_gate_conv_lstm2d_sequence(x, (h, c), pooled_gate, None, options, False, self.backend)
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
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.input_gate_attention_conv_lstm2d_cell(x, h, c, *(*weights, options))


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

    def _prepare(self, weights: list[Any]) -> list[Any]:
        # The operator has three gates. Its output gate is not used: c does not depend on it.
        gates = [
            None if w is None else torch.cat((w, w.new_zeros(w.size(0) // 2, *w.shape[1:]))) for w in weights[:3]
        ]  # fmt: skip
        return gates + weights[3:]

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = reference.gate_attention(x, h, *weights[_POOLED_GATE:])
        pooled_gate = weights[:_POOLED_GATE]
        _, (_, c) = pooled_gate_conv_lstm2d_sequence(
            x.unsqueeze(0), (h, c), pooled_gate, None, options, False, self.backend
        )
        return (attention * torch.tanh(c)).to(h.dtype), c, attention


class ConvALSTM2d(AttentionConv2d):
    r"""Convolutional attention LSTM: Li et al., "VideoLSTM convolves, attends and flows for action recognition".

    .. math::
        A_t &= \operatorname{softmax}_{H, W}(W_z * \tanh(W_{xa} * x_t + W_{ha} * h_{t-1} + b_a)) \\
        \tilde x_t &= A_t \circ x_t

    and a step of :class:`ConvLSTM2d` on :math:`\tilde x_t`. Frames and state have one size: stride 1, "same" padding.

    Args:
        in_channels, hidden_channels, num_layers: as for :class:`ConvLSTM2d`.
        kernel_size: of the ConvLSTM's convolutions; the paper has 3.
        attention_channels: A, inside the attention; those of the input if None.
        attention_kernel_size: of the attention's convolutions.
        bias, gate_activation, batch_first, dropout, bidirectional, merge_mode, backend, device, dtype: as for
            :class:`ConvLSTM2d`.

    Parameters beside those of :class:`ConvLSTM2d` (k is the layer, ``_reverse`` the second direction):
        attention_weight_ih_l[k]: (A, Cin, ah, aw). attention_weight_hh_l[k]: (A, C, ah, aw).
        attention_bias_l[k]: (A,). attention_weight_l[k]: (1, A, ah, aw).
    """

    plain = "the attention map"
    _state_weight = "weight_hh"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        kernel_size: Size,
        num_layers: int = 1,
        *,
        attention_channels: int | None = None,
        attention_kernel_size: Size = 1,
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
        self._attention = (attention_channels, pair(attention_kernel_size, "attention_kernel_size"))
        super().__init__(
            in_channels, hidden_channels, kernel_size, num_layers, bias, gate_activation, batch_first, dropout,
            bidirectional, merge_mode, backend, device, dtype,
        )  # fmt: skip

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        kernel = self.convolution.kernel_size
        return {
            "weight_ih": (4 * channels, in_channels, *kernel),
            "weight_hh": (4 * channels, channels, *kernel),
            "bias": (4 * channels,),
            **_soft_attention_shapes(in_channels, channels, *self._attention),
        }

    def _initialize(self, name: str, parameter: Tensor) -> None:
        _initialize_lstm(name, parameter, super()._initialize)

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        attention = reference.soft_attention(x, h, *weights[3:])
        x = (attention * x).unsqueeze(0)
        weight_ih, weight_hh, bias = weights[:3]
        _, (h, c) = conv_lstm2d_sequence(
            x, (h, c), weight_ih, weight_hh, bias, None, None, options, False, self.backend
        )
        return h, c, attention


class ALSTM(AttentionConv2d):
    r"""Attention LSTM on feature maps: an ``nn.LSTM`` layer on the attended mean of each frame's feature vectors.

    The ALSTM that Li et al. (VideoLSTM) compare with, after the soft attention of Xu et al. 2015. The state is a
    vector: output (T, B, C), h_n and c_n (directions, B, C). Plain PyTorch.

    .. math::
        A_t &= \operatorname{softmax}_{H, W}(w_z^T \tanh(W_{xa} x_t + W_{ha} h_{t-1} + b_a)) \\
        \tilde x_t &= \sum_{H, W} A_t \circ x_t

    Args:
        in_channels: channels of the input frames.
        hidden_channels: C, size of the state.
        attention_channels: A, inside the attention; those of the input if None.
        bias, gate_activation, batch_first, bidirectional, merge_mode, device, dtype: as for :class:`ConvLSTM2d`.

    Parameters (``_reverse`` behind the name for the second direction), gate order i, f, g, o:
        weight_ih_l0: (4 * C, Cin). weight_hh_l0: (4 * C, C). bias_l0: (4 * C,).
        attention_weight_ih_l0: (A, Cin). attention_weight_hh_l0: (A, C). attention_bias_l0: (A,).
        attention_weight_l0: (1, A).
    """

    plain = "the whole cell"
    _state_weight = "weight_hh"

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        *,
        attention_channels: int | None = None,
        bias: bool = True,
        gate_activation: str = "sigmoid",
        batch_first: bool = False,
        bidirectional: bool = False,
        merge_mode: str = "concat",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._attention_channels = attention_channels
        super().__init__(
            in_channels, hidden_channels, 1, 1, bias, gate_activation, batch_first, 0.0, bidirectional, merge_mode,
            None, device, dtype,
        )  # fmt: skip

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        attention = _soft_attention_shapes(in_channels, channels, self._attention_channels, ())
        return {
            "weight_ih": (4 * channels, in_channels),
            "weight_hh": (4 * channels, channels),
            "bias": (4 * channels,),
            **attention,
        }

    def _initialize(self, name: str, parameter: Tensor) -> None:
        _initialize_lstm(name, parameter, super()._initialize)

    def _state_size(self, input: Tensor) -> tuple[int, ...]:
        return ()

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        return reference.alstm_cell(x, h, c, *(*weights, options.gate_activation))


def _soft_attention_shapes(
    in_channels: int, channels: int, attention_channels: int | None, kernel: tuple[int, ...]
) -> Shapes:
    inner = in_channels if attention_channels is None else attention_channels
    return {
        "attention_weight_ih": (inner, in_channels, *kernel),
        "attention_weight_hh": (inner, channels, *kernel),
        "attention_bias": (inner,),
        "attention_weight": (1, inner, *kernel),
    }


def _initialize_lstm(name: str, parameter: Tensor, otherwise: Callable[[str, Tensor], None]) -> None:
    if name == "weight_ih":
        glorot_per_gate_(parameter, 4)
    elif name == "weight_hh":
        orthogonal_per_gate_(parameter, 4)
    elif name == "bias":
        forget_gate_bias_(parameter, 4)
    else:
        otherwise(name, parameter)


class MotionAttentionConvLSTM2d(nn.Module):
    r"""VideoLSTM's layer: a ConvLSTM whose input attends where another ConvLSTM saw motion (Li et al.).

    .. math::
        H^m_t, C^m_t &= \operatorname{ConvLSTM}(M_t, H^m_{t-1}, C^m_{t-1}) \\
        A_t &= \operatorname{softmax}_{H, W}(W_z * \tanh(W_{xa} * X_t + W_{ha} * H^m_{t-1} + b_a)) \\
        H_t, C_t &= \operatorname{ConvLSTM}(A_t \circ X_t, H_{t-1}, C_{t-1})

    The state of the motion ConvLSTM takes the place of :math:`H_{t-1}` in the attention of :class:`ConvALSTM2d`, so
    both ConvLSTMs run whole sequences fused.

    Args:
        in_channels, hidden_channels, kernel_size: of the prediction ConvLSTM.
        motion_channels: channels of the optical flow or of its features.
        motion_hidden_channels: M, of the motion ConvLSTM; ``hidden_channels`` if None.
        motion_kernel_size: of the motion ConvLSTM; the authors have 1.
        attention_channels: A, inside the attention; ``in_channels`` if None.
        attention_kernel_size: of the attention's convolutions.
        bias, gate_activation, batch_first, backend, device, dtype: as for :class:`ConvLSTM2d`.

    Parameters: those of ``prediction`` and ``motion``, both :class:`ConvLSTM2d`, and
        attention_weight_ih: (A, Cin, ah, aw). attention_weight_hh: (A, M, ah, aw). attention_bias: (A,).
        attention_weight: (1, A, ah, aw).
    """

    attention_weight_ih: nn.Parameter
    attention_weight_hh: nn.Parameter
    attention_bias: nn.Parameter | None
    attention_weight: nn.Parameter

    def __init__(
        self,
        in_channels: int,
        motion_channels: int,
        hidden_channels: int,
        kernel_size: Size,
        *,
        motion_hidden_channels: int | None = None,
        motion_kernel_size: Size = 1,
        attention_channels: int | None = None,
        attention_kernel_size: Size = 1,
        bias: bool = True,
        gate_activation: str = "sigmoid",
        batch_first: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.batch_first = batch_first
        motion_hidden = hidden_channels if motion_hidden_channels is None else motion_hidden_channels
        shared: dict[str, Any] = {
            "bias": bias, "gate_activation": gate_activation, "backend": backend, "device": device, "dtype": dtype,
        }  # fmt: skip
        self.prediction = ConvLSTM2d(in_channels, hidden_channels, kernel_size, **shared)
        self.motion = ConvLSTM2d(motion_channels, motion_hidden, motion_kernel_size, **shared)
        kernel = pair(attention_kernel_size, "attention_kernel_size")
        for name, shape in _soft_attention_shapes(in_channels, motion_hidden, attention_channels, kernel).items():
            parameter = None
            if bias or name != "attention_bias":
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.prediction.reset_parameters()
        self.motion.reset_parameters()
        for weight in (self.attention_weight_ih, self.attention_weight_hh, self.attention_weight):
            nn.init.xavier_uniform_(weight)
        if self.attention_bias is not None:
            nn.init.zeros_(self.attention_bias)

    def forward(
        self,
        input: Tensor,
        motion: Tensor,
        hx: tuple[tuple[Any, Any], tuple[Any, Any]] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        return_attention: bool = False,
    ) -> tuple[Any, ...]:
        """Runs the sequence.

        Args:
            input: (T, B, Cin, H, W), with ``batch_first`` (B, T, Cin, H, W).
            motion: the same with the motion's channels.
            hx: the states of the prediction and of the motion ConvLSTM, each (h_0, c_0) as for :class:`ConvLSTM2d`,
                h_0 and c_0 (1, B, C, H, W); zeros if None.
            lengths, reset: as for :meth:`ConvLSTM2d.forward`.
            return_attention: also return A, laid out like ``input`` with one channel, zero past a sample's length.

        Returns:
            output of the prediction ConvLSTM, the states in the form of ``hx``, and the attention if asked for.
        """
        if input.dim() != 5:
            raise ValueError(f"input: expected 5 dimensions, got shape {tuple(input.shape)}")
        if motion.dim() != 5 or motion.shape[:2] != input.shape[:2] or motion.shape[3:] != input.shape[3:]:
            raise ValueError(
                f"motion: expected the shape of input {tuple(input.shape)} but for the channels, "
                f"got {tuple(motion.shape)}"
            )
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise ValueError(f"hx: expected a pair (prediction state, motion state), got {type(hx).__name__}")
        prediction_state, motion_state = (None, None) if hx is None else hx
        if self.batch_first:
            input, motion = input.transpose(0, 1), motion.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        motion_output, motion_final = self.motion(motion, motion_state, lengths=lengths, reset=reset)
        first = torch.zeros_like(motion_output[:1]) if motion_state is None else motion_state[0].to(motion_output.dtype)
        before = torch.cat((first, motion_output[:-1]))  # (T, B, M, H, W): H^m(t - 1)
        flags = make_step_flags(input, lengths, reset)
        if flags is not None:
            before = before.masked_fill(_of_flags(flags, FLAG_RESET), 0)
            input = input.masked_fill(_of_flags(flags, FLAG_PAST_END), 0)
        attention = reference.soft_attention(
            input.flatten(0, 1), before.flatten(0, 1), self.attention_weight_ih, self.attention_weight_hh,
            self.attention_bias, self.attention_weight,
        )  # fmt: skip
        attention = attention.unflatten(0, input.shape[:2])
        if flags is not None:
            attention = attention.masked_fill(_of_flags(flags, FLAG_PAST_END), 0)
        registry.note(f"{type(self).__name__}: the attention map in plain PyTorch")
        output, prediction_final = self.prediction(attention * input, prediction_state, lengths=lengths, reset=reset)
        if self.batch_first:
            output, attention = output.transpose(0, 1), attention.transpose(0, 1)
        state = (prediction_final, motion_final)
        return (output, state, attention) if return_attention else (output, state)


def _of_flags(flags: Tensor, which: int) -> Tensor:  # (T, B) -> (T, B, 1, 1, 1)
    return (flags == which)[:, :, None, None, None]
