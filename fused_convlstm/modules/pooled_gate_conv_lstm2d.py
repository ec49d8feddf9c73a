"""The pooled-gate ConvLSTM, "variant (a)", as a module and as a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import registry
from ..backends.call import ConvLSTMOptions
from ..functional import POOLED_GATE_WEIGHTS, Padding, Size, State, pooled_gate_conv_lstm2d_sequence
from ._recurrent import ConvolutionArguments, RecurrentConv2d, check_pair, checked_int
from .initialization import forget_gate_bias_, glorot_per_gate_, orthogonal_per_gate_


def _make_parameters(
    in_channels: int, channels: int, convolution: ConvolutionArguments, bias: bool, factory: dict[str, Any]
) -> dict[str, nn.Parameter | None]:
    """The parameters of one layer and direction."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, **factory))

    return {
        "gate_weight_ih": parameter(3 * channels, in_channels),
        "gate_weight_hh": parameter(3 * channels, channels),
        "gate_bias": parameter(3 * channels) if bias else None,
        "depthwise_ih": parameter(in_channels, 1, *convolution.kernel_size),
        "depthwise_hh": parameter(channels, 1, *convolution.recurrent_kernel_size),
        "pointwise_ih": parameter(channels, in_channels),
        "pointwise_hh": parameter(channels, channels),
        "bias": parameter(channels) if bias else None,
    }


def _initialize(parameters: Sequence[Any]) -> None:
    (gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias) = (
        parameters
    )
    glorot_per_gate_(gate_weight_ih, 3)
    orthogonal_per_gate_(gate_weight_hh, 3)
    for depthwise in (depthwise_ih, depthwise_hh):
        # A depthwise kernel has one input and one output channel: Glorot's bound counts its taps alone.
        taps = depthwise.size(2) * depthwise.size(3)
        bound = (3.0 / taps) ** 0.5
        nn.init.uniform_(depthwise, -bound, bound)
    glorot_per_gate_(pointwise_ih, 1)
    orthogonal_per_gate_(pointwise_hh, 1)
    if gate_bias is not None:
        forget_gate_bias_(gate_bias, 3)
    if bias is not None:
        nn.init.zeros_(bias)


class PooledGateConvLSTM2d(RecurrentConv2d):
    r"""Pooled-gate ConvLSTM over a sequence of frames, fused: "variant (a)" of Zhang et al., eq. (8) to (16).

    The gates are vectors, one value a channel, from globally pooled input and state; the candidate is a sum of two
    depthwise-separable convolutions. About a ninth of a 3x3 ConvLSTM's parameters.

    .. math::
        i_t, f_t, o_t &= \sigma(W \bar x_t + U \bar h_{t-1} + b) \\
        g_t &= \tanh(P_x D_x * x_t + P_h D_h * h_{t-1} + b_g) \\
        c_t &= f_t \circ c_{t-1} + i_t \circ g_t \\
        h_t &= o_t \circ \tanh(c_t)

    The arguments are those of :class:`ConvLSTM2d`, where they apply. The authors' code uses
    ``gate_activation="hard_sigmoid_keras2"``; the paper says sigmoid.

    Parameters (k is the layer, with ``_reverse`` behind it for the second direction), gate order i, f, o:
        gate_weight_ih_l[k]: (3 * C, Cin). gate_weight_hh_l[k]: (3 * C, C). gate_bias_l[k]: (3 * C,).
        depthwise_ih_l[k]: (Cin, 1, kh, kw). depthwise_hh_l[k]: (C, 1, rh, rw).
        pointwise_ih_l[k]: (C, Cin). pointwise_hh_l[k]: (C, C). bias_l[k]: (C,).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        kernel_size: Size,
        num_layers: int = 1,
        *,
        recurrent_kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        recurrent_dilation: Size | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
        gate_activation: str = "sigmoid",
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        merge_mode: str = "concat",
        recompute_gates: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        convolution = ConvolutionArguments(
            kernel_size, recurrent_kernel_size, stride, padding, dilation, recurrent_dilation, 1, padding_mode,
            gate_activation,
        )  # fmt: skip
        super().__init__(
            in_channels, hidden_channels, num_layers, convolution, bias, batch_first, dropout, bidirectional,
            merge_mode, recompute_gates, backend,
        )  # fmt: skip
        factory = {"device": device, "dtype": dtype}
        for layer, channels in enumerate(self.hidden_channels):
            for direction in ("", "_reverse") if bidirectional else ("",):
                parameters = _make_parameters(self._layer_in_channels(layer), channels, convolution, bias, factory)
                for name, parameter in parameters.items():
                    self.register_parameter(f"{name}_l{layer}{direction}", parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for suffix in self._suffixes():
            _initialize(self._layer_parameters(suffix))

    def _layer_parameters(self, suffix: str) -> list[Any]:
        return [getattr(self, f"{name}{suffix}") for name in POOLED_GATE_WEIGHTS]

    def _run_layer(
        self, suffix: str, input: Tensor, hx: State | None, step_flags: Tensor | None, options: ConvLSTMOptions
    ) -> tuple[Tensor, State]:
        parameters = self._layer_parameters(suffix)
        return pooled_gate_conv_lstm2d_sequence(
            input, hx, parameters, step_flags, options, self.recompute_gates, self.backend
        )


class PooledGateConvLSTM2dCell(nn.Module):
    """One step of the pooled-gate ConvLSTM, with the habits of ``nn.LSTMCell``.

    The arguments are those of :class:`PooledGateConvLSTM2d`, the parameters' names too, without an ending.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: Size,
        *,
        recurrent_kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Padding = "same",
        dilation: Size = 1,
        recurrent_dilation: Size | None = None,
        padding_mode: str = "zeros",
        bias: bool = True,
        gate_activation: str = "sigmoid",
        recompute_gates: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if backend is not None:
            registry.check_name(backend, "backend")
        self.in_channels = in_channels = checked_int(in_channels, "in_channels")
        self.hidden_channels = hidden_channels = checked_int(hidden_channels, "hidden_channels")
        self.convolution = ConvolutionArguments(
            kernel_size, recurrent_kernel_size, stride, padding, dilation, recurrent_dilation, 1, padding_mode,
            gate_activation,
        )  # fmt: skip
        self.recompute_gates = recompute_gates
        self.backend = backend
        factory = {"device": device, "dtype": dtype}
        parameters = _make_parameters(in_channels, hidden_channels, self.convolution, bias, factory)
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _initialize([getattr(self, name) for name in POOLED_GATE_WEIGHTS])

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """``input`` is (B, Cin, H, W) or (Cin, H, W), ``hx`` (h, c), each (B, C, Ho, Wo) or (C, Ho, Wo); returns the
        new (h, c)."""
        if input.dim() not in (3, 4):
            raise ValueError(f"input: expected 4 dimensions, or 3 without a batch, got shape {tuple(input.shape)}")
        batched = input.dim() == 4
        frames = input[None] if batched else input[None, None]
        check_pair(hx)
        if not batched and hx is not None:
            hx = (hx[0][None], hx[1][None])
        weights = [getattr(self, name) for name in POOLED_GATE_WEIGHTS]
        _, (h, c) = pooled_gate_conv_lstm2d_sequence(
            frames, hx, weights, None, self.convolution.options(), self.recompute_gates, self.backend
        )
        return (h, c) if batched else (h[0], c[0])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, {self.convolution!r}"
