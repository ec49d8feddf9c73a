"""The convolutional LSTM as a module and as a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import registry
from ..backends.call import ConvLSTMOptions
from ..functional import Padding, Size, State, check_choice, conv_lstm2d_sequence, pair
from ._recurrent import ConvolutionArguments, RecurrentConv2d, check_pair, checked_int
from .initialization import forget_gate_bias_, glorot_per_gate_, orthogonal_per_gate_

PEEPHOLES = ("none", "channel", "pixel")


def _make_parameters(
    in_channels: int,
    channels: int,
    convolution: ConvolutionArguments,
    bias: bool,
    peephole: str,
    state_size: tuple[int, int] | None,
    factory: dict[str, Any],
) -> dict[str, nn.Parameter | None]:
    """The parameters of one layer and direction, initialised."""
    groups = convolution.groups
    if in_channels % groups or channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the input channels ({in_channels}) and the hidden channels ({channels}), "
            f"got {groups!r}"
        )
    weight_ih = torch.empty(4 * channels, in_channels // groups, *convolution.kernel_size, **factory)
    weight_hh = torch.empty(4 * channels, channels // groups, *convolution.recurrent_kernel_size, **factory)
    parameters: dict[str, nn.Parameter | None] = {
        "weight_ih": nn.Parameter(weight_ih),
        "weight_hh": nn.Parameter(weight_hh),
        "bias": nn.Parameter(torch.empty(4 * channels, **factory)) if bias else None,
        "peephole": None,
    }
    if peephole != "none":
        parameters["peephole"] = nn.Parameter(torch.empty(3, channels, *(state_size or ()), **factory))
    return parameters


def _initialize(weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, peephole: Tensor | None) -> None:
    glorot_per_gate_(weight_ih, 4)
    orthogonal_per_gate_(weight_hh, 4)
    if bias is not None:
        forget_gate_bias_(bias, 4)
    if peephole is not None:
        nn.init.zeros_(peephole)


def _first_state_size(
    peephole: str, image_size: Size | None, convolution: ConvolutionArguments
) -> tuple[int, int] | None:
    """State size of the first layer, where a per-pixel peephole needs to know it."""
    check_choice(peephole, "peephole", PEEPHOLES)
    if (peephole == "pixel") != (image_size is not None):
        raise ValueError(
            "image_size: expected the height and width of the input with peephole='pixel' and only then, "
            f"got {image_size!r} with peephole={peephole!r}"
        )
    return None if image_size is None else _state_size(convolution, pair(image_size, "image_size"))


def _state_size(convolution: ConvolutionArguments, input_size: tuple[int, int]) -> tuple[int, int]:
    size = convolution.state_size(input_size)
    if min(size) < 1:
        raise ValueError(
            f"image_size: expected one whose frames are no smaller than the kernel {convolution.kernel_size} in every "
            f"layer, got frames of {input_size}"
        )
    return size


class ConvLSTM2d(RecurrentConv2d):
    r"""Convolutional LSTM over a sequence of frames, fused: a drop-in relative of ``nn.LSTM`` and ``nn.Conv2d``.

    .. math::
        i_t &= \sigma(W_i * x_t + U_i * h_{t-1} + b_i) \\
        f_t &= \sigma(W_f * x_t + U_f * h_{t-1} + b_f) \\
        g_t &= \tanh(W_g * x_t + U_g * h_{t-1} + b_g) \\
        o_t &= \sigma(W_o * x_t + U_o * h_{t-1} + b_o) \\
        c_t &= f_t \circ c_{t-1} + i_t \circ g_t \\
        h_t &= o_t \circ \tanh(c_t)

    Courtney & Sreenivas, eq. (1). With peepholes, Shi et al. 2015, eq. (3).

    Args:
        in_channels: channels of the input frames.
        hidden_channels: channels of the state, one number or one a layer.
        kernel_size: of the input convolutions.
        num_layers: how many layers are stacked. The convolution arguments hold for each layer.
        recurrent_kernel_size: of the recurrent convolutions; ``kernel_size`` if None.
        stride: of the input convolutions; the state is smaller than the input by it.
        padding: of the input convolutions: "same", "valid", a number, (vertical, horizontal), or
            ((top, bottom), (left, right)). The recurrent convolutions always keep the size of the state.
        dilation: of the input convolutions.
        recurrent_dilation: of the recurrent convolutions; ``dilation`` if None.
        groups: every gate's convolutions have this many groups.
        padding_mode: "zeros", "circular", "replicate" or "reflect", for both convolutions.
        bias: whether there is a bias.
        peephole: "none", "channel" (one weight a channel) or "pixel" (one a channel and pixel, needs ``image_size``).
        image_size: height and width of the input frames, for per-pixel peepholes.
        gate_activation: "sigmoid", "hard_sigmoid" (relu6(x + 3) / 6) or "hard_sigmoid_keras2" (clip(0.2 x + 0.5)).
        batch_first: input and output are (B, T, C, H, W).
        dropout: probability of dropout on the output of each layer but the last, one mask for the whole sequence.
        bidirectional: a second set of layers runs from the end to the start.
        merge_mode: how the two directions become one output: "concat", "sum", "mean" or "product".
        recompute_gates: train with less memory: compute the gates again in backward rather than keep them.
        backend: "auto", "reference" or the name of a backend; None leaves the choice to ``use_backend``, then to the
            environment variable FUSED_CONVLSTM_BACKEND, then to "auto".
        device, dtype: of the parameters.

    Parameters (k is the layer, with ``_reverse`` behind it for the second direction), gate order i, f, g, o:
        weight_ih_l[k]: (4 * C, Cin / groups, kh, kw), Glorot-uniform.
        weight_hh_l[k]: (4 * C, C / groups, rh, rw), orthogonal.
        bias_l[k]: (4 * C,), zero, one for the forget gate.
        peephole_l[k]: (3, C) or (3, C, Ho, Wo), order i, f, o, zero.

    Example:
        >>> lstm = ConvLSTM2d(3, 16, kernel_size=3)
        >>> output, (h_n, c_n) = lstm(torch.randn(10, 2, 3, 24, 24))
        >>> output.shape, h_n.shape
        (torch.Size([10, 2, 16, 24, 24]), torch.Size([1, 2, 16, 24, 24]))
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
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        peephole: str = "none",
        image_size: Size | None = None,
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
            kernel_size, recurrent_kernel_size, stride, padding, dilation, recurrent_dilation, groups, padding_mode,
            gate_activation,
        )  # fmt: skip
        super().__init__(
            in_channels, hidden_channels, num_layers, convolution, bias, batch_first, dropout, bidirectional,
            merge_mode, recompute_gates, backend,
        )  # fmt: skip
        state_size = _first_state_size(peephole, image_size, convolution)
        self.peephole = peephole
        self.image_size = None if image_size is None else pair(image_size, "image_size")
        factory = {"device": device, "dtype": dtype}
        for layer, channels in enumerate(self.hidden_channels):
            if layer > 0 and state_size is not None:
                state_size = _state_size(convolution, state_size)
            for direction in ("", "_reverse") if bidirectional else ("",):
                parameters = _make_parameters(
                    self._layer_in_channels(layer), channels, convolution, bias, peephole, state_size, factory
                )
                for name, parameter in parameters.items():
                    self.register_parameter(f"{name}_l{layer}{direction}", parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for suffix in self._suffixes():
            _initialize(*self._layer_parameters(suffix))

    def _layer_parameters(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return (
            getattr(self, f"weight_ih{suffix}"),
            getattr(self, f"weight_hh{suffix}"),
            getattr(self, f"bias{suffix}"),
            getattr(self, f"peephole{suffix}"),
        )

    def _run_layer(
        self, suffix: str, input: Tensor, hx: State | None, step_flags: Tensor | None, options: ConvLSTMOptions
    ) -> tuple[Tensor, State]:
        parameters = self._layer_parameters(suffix)
        return conv_lstm2d_sequence(input, hx, *parameters, step_flags, options, self.recompute_gates, self.backend)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.peephole == "none" else f"{text}, peephole={self.peephole!r}, image_size={self.image_size}"


class ConvLSTM2dCell(nn.Module):
    """One step of a convolutional LSTM, with the habits of ``nn.LSTMCell``.

    The arguments are those of :class:`ConvLSTM2d`; the parameters are ``weight_ih``, ``weight_hh``, ``bias`` and
    ``peephole``.
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
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        peephole: str = "none",
        image_size: Size | None = None,
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
            kernel_size, recurrent_kernel_size, stride, padding, dilation, recurrent_dilation, groups, padding_mode,
            gate_activation,
        )  # fmt: skip
        self.recompute_gates = recompute_gates
        self.backend = backend
        state_size = _first_state_size(peephole, image_size, self.convolution)
        parameters = _make_parameters(
            in_channels, hidden_channels, self.convolution, bias, peephole, state_size,
            {"device": device, "dtype": dtype},
        )  # fmt: skip
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.reset_parameters()

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    peephole: Tensor | None

    def reset_parameters(self) -> None:
        _initialize(self.weight_ih, self.weight_hh, self.bias, self.peephole)

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
        _, (h, c) = conv_lstm2d_sequence(
            frames, hx, self.weight_ih, self.weight_hh, self.bias, self.peephole, None, self.convolution.options(),
            self.recompute_gates, self.backend,
        )  # fmt: skip
        return (h, c) if batched else (h[0], c[0])

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, {self.convolution!r}, bias={self.bias is not None}"
