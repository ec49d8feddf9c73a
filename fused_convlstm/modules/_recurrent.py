"""What the recurrent modules share: layers, directions, states, packed sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ..backends import registry
from ..backends.call import ConvLSTMOptions, conv_output_size
from ..functional import (
    PADDING_MODES,
    Padding,
    Size,
    State,
    check_choice,
    is_int,
    make_step_flags,
    pair,
    resolve_padding,
)
from ..reference import GATE_ACTIVATIONS

MERGE_MODES = ("concat", "sum", "mean", "product")

# One tensor (num_layers * directions, B, C, Ho, Wo) where all states have one shape, else one (B, C, Ho, Wo) each.
States = Tensor | tuple[Tensor, ...]


class ConvolutionArguments:
    """The checked convolution arguments of a module."""

    def __init__(
        self,
        kernel_size: Size,
        recurrent_kernel_size: Size | None,
        stride: Size,
        padding: Padding,
        dilation: Size,
        recurrent_dilation: Size | None,
        groups: int,
        padding_mode: str,
        gate_activation: str,
    ) -> None:
        check_choice(padding_mode, "padding_mode", PADDING_MODES)
        check_choice(gate_activation, "gate_activation", tuple(GATE_ACTIVATIONS))
        self.kernel_size = pair(kernel_size, "kernel_size")
        self.recurrent_kernel_size = (
            self.kernel_size if recurrent_kernel_size is None else pair(recurrent_kernel_size, "recurrent_kernel_size")
        )
        self.stride = pair(stride, "stride")
        self.dilation = pair(dilation, "dilation")
        self.recurrent_dilation = (
            self.dilation if recurrent_dilation is None else pair(recurrent_dilation, "recurrent_dilation")
        )
        self.padding = resolve_padding(padding, self.kernel_size, self.dilation)
        self.groups = checked_int(groups, "groups")
        self.padding_mode = padding_mode
        self.gate_activation = gate_activation

    def options(self, reverse: bool = False) -> ConvLSTMOptions:
        return ConvLSTMOptions(
            self.stride,
            self.padding,
            self.dilation,
            self.recurrent_dilation,
            self.groups,
            self.padding_mode,
            self.gate_activation,
            reverse,
        )

    def state_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        return conv_output_size(input_size, self.kernel_size, self.stride, self.padding, self.dilation)

    def __repr__(self) -> str:
        text = f"kernel_size={self.kernel_size}"
        for name, default in (
            ("recurrent_kernel_size", self.kernel_size),
            ("stride", (1, 1)),
            ("padding", resolve_padding("same", self.kernel_size, self.dilation)),
            ("dilation", (1, 1)),
            ("recurrent_dilation", self.dilation),
            ("groups", 1),
            ("padding_mode", "zeros"),
            ("gate_activation", "sigmoid"),
        ):
            value = getattr(self, name)
            text += "" if value == default else f", {name}={value!r}"
        return text


def checked_int(value: Any, name: str) -> int:
    if not is_int(value, 1):
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    return int(value)


class RecurrentConv2d(nn.Module, ABC):
    """Stacked, possibly bidirectional recurrent convolutions with the calling habits of ``nn.LSTM``."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        num_layers: int,
        convolution: ConvolutionArguments,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        merge_mode: str,
        recompute_gates: bool,
        backend: str | None,
    ) -> None:
        super().__init__()
        in_channels = checked_int(in_channels, "in_channels")
        num_layers = checked_int(num_layers, "num_layers")
        channels: tuple[Any, ...]
        channels = tuple(hidden_channels) if isinstance(hidden_channels, Iterable) else (hidden_channels,) * num_layers
        if len(channels) != num_layers or not all(is_int(c, 1) for c in channels):
            raise ValueError(
                f"hidden_channels: expected an int of at least 1, or one for each of {num_layers} layers, "
                f"got {hidden_channels!r}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout!r}")
        check_choice(merge_mode, "merge_mode", MERGE_MODES)
        if backend is not None:
            registry.check_name(backend, "backend")
        self.in_channels = in_channels
        self.hidden_channels = tuple(map(int, channels))
        self.num_layers = num_layers
        self.convolution = convolution
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.merge_mode = merge_mode
        self.recompute_gates = recompute_gates
        self.backend = backend

    # As on nn.Conv2d, always as tuples.

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.convolution.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        return self.convolution.stride

    @property
    def padding(self) -> tuple[int, int, int, int]:  # top, bottom, left, right
        return self.convolution.padding

    @property
    def dilation(self) -> tuple[int, int]:
        return self.convolution.dilation

    @property
    def groups(self) -> int:
        return self.convolution.groups

    @property
    def padding_mode(self) -> str:
        return self.convolution.padding_mode

    @abstractmethod
    def _run_layer(self, *args: Any, **layer_arguments: Any) -> tuple[Tensor, State]:
        """One layer in one direction.

        Args:
            suffix: of the layer's parameter names.
            input: (T, B, Cin, H, W).
            hx: the layer's state, or None.
            step_flags: (T, B), or None.
            options: of the direction, :class:`ConvLSTMOptions`.
            layer_arguments: those of ``_forward``.
        """

    def _suffixes(self) -> list[str]:
        """``_l0``, ``_l0_reverse``, ``_l1``, ...: the endings of the parameters' names."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _layer_in_channels(self, layer: int) -> int:
        if layer == 0:
            return self.in_channels
        concatenated = self.bidirectional and self.merge_mode == "concat"
        return self.hidden_channels[layer - 1] * (2 if concatenated else 1)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Any, Any] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Runs the sequence.

        Args:
            input: (T, B, Cin, H, W), with ``batch_first`` (B, T, Cin, H, W), without a batch (T, Cin, H, W), or a
                ``PackedSequence`` of frames.
            hx: (h_0, c_0), as returned by an earlier call; zeros if None. Each is one tensor
                (num_layers * directions, B, C, Ho, Wo), or, where layers differ in the shape of their state, a tuple of
                one (B, C, Ho, Wo) a layer and direction. Without a batch, the same without B.
            lengths: (B,), the number of valid steps of each sample. Past its end a sample's state stands still and its
                output is zero.
            reset: boolean (T, B), with ``batch_first`` (B, T), without a batch (T,): where True, the state of that
                sample is zeroed before that step (in the order in which a direction runs).

        Returns:
            output like ``input``, with the last layer's channels (twice as many if both directions are concatenated);
            and (h_n, c_n) in the form of ``hx``. h_n and c_n are those of each sample's last valid step. For
            half-precision inputs c_n is float32, so that a sequence in chunks gives what the whole sequence gives.
        """
        return self._forward(input, hx, lengths, reset, {})

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Any, Any] | None,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        layer_arguments: dict[str, Any],  # what a subclass adds to the arguments of its `_run_layer`
    ) -> tuple[Any, tuple[Any, Any]]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, layer_arguments)
        if input.dim() not in (4, 5):
            raise ValueError(f"input: expected 5 dimensions, or 4 without a batch, got shape {tuple(input.shape)}")
        batched = input.dim() == 5
        check_reset(reset, 2 if batched else 1)
        if not batched:
            input = input.unsqueeze(1)
            reset = None if reset is None else reset.unsqueeze(-1)
            check_pair(hx)
            hx = None if hx is None else (_map(hx[0], _unsqueeze), _map(hx[1], _unsqueeze))
        elif self.batch_first:
            input = input.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        output, h_n, c_n = self._forward_layers(input, hx, make_step_flags(input, lengths, reset), layer_arguments)
        if not batched:
            return output.squeeze(1), (_map(h_n, _squeeze), _map(c_n, _squeeze))
        return output.transpose(0, 1) if self.batch_first else output, (h_n, c_n)

    def _forward_packed(
        self,
        packed: PackedSequence,
        hx: tuple[Any, Any] | None,
        lengths: Any,
        reset: Tensor | None,
        layer_arguments: dict[str, Any],
    ) -> tuple[PackedSequence, tuple[Any, Any]]:
        if lengths is not None:
            raise ValueError("lengths: expected None with a PackedSequence, which has lengths of its own")
        if packed.data.dim() != 4:
            raise ValueError(
                f"input: expected a PackedSequence of (Cin, H, W) frames, got data of shape {tuple(packed.data.shape)}"
            )
        input, own_lengths = pad_packed_sequence(packed)
        check_reset(reset, 2)
        if self.batch_first and reset is not None:
            reset = reset.transpose(0, 1)
        flags = make_step_flags(input, own_lengths, reset)
        output, h_n, c_n = self._forward_layers(input, hx, flags, layer_arguments)
        # Samples of equal length stay in the order in which they are packed.
        order = packed.sorted_indices
        if order is not None:
            output, own_lengths = output.index_select(1, order), own_lengths.index_select(0, order.cpu())
        data = pack_padded_sequence(output, own_lengths).data
        return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices), (h_n, c_n)

    def _forward_layers(
        self, input: Tensor, hx: tuple[Any, Any] | None, step_flags: Tensor | None, layer_arguments: dict[str, Any]
    ) -> tuple[Tensor, States, States]:
        if input.size(2) != self.in_channels:
            raise ValueError(f"input: expected {self.in_channels} channels, got shape {tuple(input.shape)}")
        suffixes = self._suffixes()
        states = self._unpack_states(hx, len(suffixes))
        directions = 2 if self.bidirectional else 1
        finals: list[State] = []
        output = input
        for layer in range(self.num_layers):
            results = []
            for direction in range(directions):
                k = layer * directions + direction
                options = self.convolution.options(reverse=direction == 1)
                result, final = self._run_layer(suffixes[k], output, states[k], step_flags, options, **layer_arguments)
                results.append(result)
                finals.append(final)
            output = results[0] if directions == 1 else self._merge(results[0], results[1])
            if layer < self.num_layers - 1:
                output = sequence_dropout(output, self.dropout, self.training)
        return output, _pack_states([h for h, _ in finals]), _pack_states([c for _, c in finals])

    def _merge(self, forward: Tensor, backward: Tensor) -> Tensor:
        if self.merge_mode == "concat":
            return torch.cat((forward, backward), dim=2)
        if self.merge_mode == "product":
            return forward * backward
        total = forward + backward
        return total if self.merge_mode == "sum" else total / 2

    def _unpack_states(self, hx: tuple[Any, Any] | None, count: int) -> list[State | None]:
        if hx is None:
            return [None] * count
        check_pair(hx)
        for name, value in (("h_0", hx[0]), ("c_0", hx[1])):
            if len(value) != count:
                raise ValueError(f"{name}: expected {count} states (num_layers * directions), got {len(value)}")
        return [(hx[0][k], hx[1][k]) for k in range(count)]

    def extra_repr(self) -> str:
        channels = self.hidden_channels[0] if len(set(self.hidden_channels)) == 1 else self.hidden_channels
        text = f"{self.in_channels}, {channels}, {self.convolution!r}"
        for name, default in (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0.0),
            ("bidirectional", False),
            ("merge_mode", "concat"),
            ("recompute_gates", False),
            ("backend", None),
        ):
            value = getattr(self, name)
            text += "" if value == default else f", {name}={value!r}"
        return text


def sequence_dropout(input: Tensor, p: float, training: bool = True) -> Tensor:
    """Dropout with one mask for all steps of a sequence (T, B, ...): Zaremba et al. 2014."""
    if not training or p == 0.0:
        return input
    return input * torch.nn.functional.dropout(torch.ones_like(input[:1]), p)


def check_reset(reset: Any, dimensions: int) -> None:
    if reset is not None and (not isinstance(reset, Tensor) or reset.dim() != dimensions):
        got = f"shape {tuple(reset.shape)}" if isinstance(reset, Tensor) else type(reset).__name__
        raise ValueError(f"reset: expected a boolean tensor with {dimensions} dimensions, got {got}")


def check_pair(hx: Any) -> None:
    """A pair of states, each one tensor or a sequence of tensors."""
    if hx is None:
        return
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise ValueError(f"hx: expected a pair (h_0, c_0), got {type(hx).__name__}")
    for name, value in (("h_0", hx[0]), ("c_0", hx[1])):
        if not isinstance(value, (Tensor, tuple, list)) or (isinstance(value, Tensor) and value.dim() == 0):
            raise ValueError(f"{name}: expected a tensor or a tuple of tensors, got {value!r}")


def _pack_states(states: list[Tensor]) -> States:
    if len(states) == 1:
        return states[0].unsqueeze(0)
    if all(state.shape == states[0].shape for state in states):  # sizes may be symbolic
        return torch.stack(states)
    return tuple(states)


def _map(states: States, function: Any) -> States:
    return torch.stack([function(s) for s in states]) if isinstance(states, Tensor) else tuple(map(function, states))


def _unsqueeze(state: Tensor) -> Tensor:
    return state.unsqueeze(0)


def _squeeze(state: Tensor) -> Tensor:
    return state.squeeze(0)
