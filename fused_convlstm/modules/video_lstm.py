"""VideoLSTM (Li et al.): ConvALSTM, the ALSTM that it is compared with, and motion attention.

What runs fused: :class:`ConvALSTM2d` goes step by step, each on A o x through ConvLSTM's operator. With motion
attention nothing waits for the state, and both ConvLSTMs run whole sequences through the operator. :class:`ALSTM` works
on vectors and is plain PyTorch, and so is every attention map. ``explain`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference_attention as reference
from ..backends import registry
from ..backends.call import FLAG_PAST_END, FLAG_RESET, ConvLSTMOptions
from ..functional import Size, conv_lstm2d_sequence, make_step_flags, pair
from ..reference_attention import SoftAttentionWeights
from ._recurrent import check_reset
from .attention import AttentionConv2d, Shapes
from .conv_lstm2d import ConvLSTM2d
from .initialization import forget_gate_bias_, glorot_per_gate_, orthogonal_per_gate_


class _SoftAttention(AttentionConv2d):
    """An LSTM with four gates in one weight each, and soft attention on its input."""

    _state_weight = "weight_hh"

    def _initialize(self, name: str, parameter: Tensor) -> None:
        if name == "weight_ih":
            glorot_per_gate_(parameter, 4)
        elif name == "weight_hh":
            orthogonal_per_gate_(parameter, 4)
        elif name == "bias":
            forget_gate_bias_(parameter, 4)
        else:
            super()._initialize(name, parameter)

    def _prepare(self, weights: list[Any]) -> list[Any]:
        return [*weights[:3], SoftAttentionWeights(*weights[3:])]


class ConvALSTM2d(_SoftAttention):
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
            in_channels, hidden_channels, kernel_size, num_layers, bias=bias, gate_activation=gate_activation,
            batch_first=batch_first, dropout=dropout, bidirectional=bidirectional, merge_mode=merge_mode,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        kernel = self.convolution.kernel_size
        return {
            "weight_ih": (4 * channels, in_channels, *kernel),
            "weight_hh": (4 * channels, channels, *kernel),
            "bias": (4 * channels,),
            **_soft_attention_shapes(in_channels, channels, *self._attention),
        }

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_ih, weight_hh, bias, attention_weights = weights
        attention = reference.soft_attention(x, h, attention_weights)
        _, (h, c) = conv_lstm2d_sequence(
            (attention * x)[None], (h, c), weight_ih, weight_hh, bias, None, None, options, False, self.backend
        )
        return h, c, attention


class ALSTM(_SoftAttention):
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
            in_channels, hidden_channels, 1, bias=bias, gate_activation=gate_activation, batch_first=batch_first,
            bidirectional=bidirectional, merge_mode=merge_mode, device=device, dtype=dtype,
        )  # fmt: skip

    def _shapes(self, in_channels: int, channels: int) -> Shapes:
        attention = _soft_attention_shapes(in_channels, channels, self._attention_channels, ())
        return {
            "weight_ih": (4 * channels, in_channels),
            "weight_hh": (4 * channels, channels),
            "bias": (4 * channels,),
            **attention,
        }

    def _state_size(self, input: Tensor) -> tuple[int, ...]:
        return ()

    def _cell(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Any], options: ConvLSTMOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_ih, weight_hh, bias, attention_weights = weights
        return reference.alstm_cell(x, h, c, weight_ih, weight_hh, bias, attention_weights, options.gate_activation)


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
        check_reset(reset, 2)
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
        weights = SoftAttentionWeights(
            self.attention_weight_ih, self.attention_weight_hh, self.attention_bias, self.attention_weight
        )
        attention = reference.soft_attention(input.flatten(0, 1), before.flatten(0, 1), weights)
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
