"""What every video model shares: frames and a whole state in, outputs and a whole state out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..functional import State
from ..modules._recurrent import RecurrentConv2d

# Everything that a model carries from one chunk of a clip to the next: a flat dictionary, "layer.part" -> tensor.
ModelState = dict[str, Tensor]


def detach_state(state: ModelState) -> ModelState:
    """The state without its history: what truncated back-propagation hands to the next chunk."""
    return {name: tensor.detach() for name, tensor in state.items()}


def every(period: int, steps: int, batch: int) -> Tensor:
    """A reset schedule: True (T, B) at steps 0, ``period``, 2 * ``period``, ..."""
    if period < 1:
        raise ValueError(f"period: expected at least 1, got {period}")
    return (torch.arange(steps) % period == 0)[:, None].expand(steps, batch)


class Carry:
    """What travels through the layers of a model beside the frames.

    It holds the state before the chunk, collects the state after it, and knows which steps are valid and where states
    are to be reset. :meth:`scope` gives the view of a part of the model, whose names begin with that part's.
    """

    def __init__(self, state: ModelState | None, lengths: Tensor | None, valid: Tensor | None) -> None:
        self.before = state
        self.after: ModelState = {}
        self.lengths = lengths  # (B,)
        self.valid = valid  # (T, B) boolean, or None if every step is
        self.prefix = ""
        self.reset: Tensor | None = None  # (T, B) boolean

    def scope(self, name: str, reset: Tensor | None = None) -> Carry:
        """The view of the part called ``name``; its convolutional states are reset where ``reset`` says."""
        part = Carry(self.before, self.lengths, self.valid)
        part.after = self.after
        part.prefix = f"{self.prefix}{name}."
        part.reset = self.reset if reset is None else reset
        return part

    def get(self, name: str) -> Tensor | None:
        """A tensor of the state before the chunk, None at the start of a clip."""
        if self.before is None:
            return None
        if self.prefix + name not in self.before:
            raise ValueError(f"state: expected a tensor {self.prefix + name!r}, got {', '.join(self.before) or 'none'}")
        return self.before[self.prefix + name]

    def put(self, name: str, tensor: Tensor) -> None:
        self.after[self.prefix + name] = tensor

    def conv_lstm(
        self,
        name: str,
        layer: RecurrentConv2d,  # one layer, one direction
        x: Tensor,  # (T, B, Cin, H, W)
        initial: State | None = None,  # at the start of a clip; zeros if None
    ) -> Tensor:  # (T, B, C, Ho, Wo)
        hx = self._state(name, initial)
        output, (h_n, c_n) = layer(x, hx, lengths=self.lengths, reset=self.reset)
        self.put(f"{name}.h", h_n[0])
        self.put(f"{name}.c", c_n[0])
        return output

    def lstm(
        self,
        name: str,
        layer: nn.LSTM,  # time-major, one layer, one direction
        x: Tensor,  # (T, B, F)
        initial: State | None = None,  # at the start of a clip; zeros if None
    ) -> Tensor:  # (T, B, C)
        hx = self._state(name, initial)
        if self.valid is None:
            output, (h_n, c_n) = layer(x, hx)
        else:
            output, (h_n, c_n) = _ragged_lstm(layer, x, hx, self.lengths)
        self.put(f"{name}.h", h_n[0])
        self.put(f"{name}.c", c_n[0])
        return output

    def _state(self, name: str, initial: State | None) -> State | None:
        """h and c of a layer before the chunk, with a dimension of one layer in front."""
        h, c = self.get(f"{name}.h"), self.get(f"{name}.c")
        if h is None or c is None:
            return None if initial is None else (initial[0][None], initial[1][None])
        return h[None], c[None]


def _ragged_lstm(
    layer: nn.LSTM,
    x: Tensor,  # (T, B, F)
    hx: tuple[Tensor, Tensor] | None,  # (1, B, C) each
    lengths: Tensor | None,  # (B,), on the CPU
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``layer`` over samples of different lengths, some of which may be over already."""
    assert lengths is not None
    steps, batch = x.shape[:2]
    if hx is None:
        zeros = x.new_zeros((1, batch, layer.hidden_size))
        hx = (zeros, zeros)
    running = torch.nonzero(lengths > 0).flatten()
    index = running.to(x.device)
    packed = pack_padded_sequence(x[:, index], lengths[running], enforce_sorted=False)
    packed_output, (h, c) = layer(packed, (hx[0][:, index], hx[1][:, index]))
    running_output, _ = pad_packed_sequence(packed_output, total_length=steps)
    output = running_output.new_zeros((steps, batch, layer.hidden_size)).index_copy(1, index, running_output)
    return output, (hx[0].to(h.dtype).index_copy(1, index, h), hx[1].to(c.dtype).index_copy(1, index, c))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The options of every model."""

    num_classes: int = 500
    in_channels: int = 1

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {self.num_classes}")
        if self.in_channels < 1:
            raise ValueError(f"in_channels: expected at least 1, got {self.in_channels}")


class StreamingModel(nn.Module, ABC):
    """A video model that gives an output at every frame and can be stopped and continued between any two.

    Args of the call:
        frames: (T, B, C, H, W), floating point.
        state: as returned by an earlier call; None at the start of a clip.
        lengths: (B,) on the CPU, how many of these T steps are valid for each sample, 0 to T. Past its end a sample's
            state stands still, and its outputs mean nothing.
        resets: for some of ``scales``, a boolean (T, B): where True, the states of the ConvLSTMs of that scale are
            zeroed before that step (section 5.1 of Courtney & Sreenivas).

    Returns:
        outputs (T, B, num_classes), before any softmax, and the state after these frames, a flat dictionary of tensors.
    """

    config: ModelConfig
    scales: tuple[str, ...]  # the names that ``resets`` may use, finest first
    streams: bool = True  # whether a clip may be given in chunks

    def forward(
        self,
        frames: Tensor,
        state: ModelState | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, ModelState]:
        channels = self.config.in_channels
        if frames.dim() != 5 or frames.size(2) != channels or not frames.dtype.is_floating_point:
            raise ValueError(
                f"frames: expected floating-point (T, B, {channels}, H, W), "
                f"got {frames.dtype} of shape {tuple(frames.shape)}"
            )
        if frames.size(0) < 1 or frames.size(1) < 1:
            raise ValueError(f"frames: expected at least one frame of one sample, got shape {tuple(frames.shape)}")
        valid = _valid_steps(frames, lengths)
        carry = Carry(state, None if valid is None else lengths, valid)
        outputs = self._run(frames, carry, self._checked_resets(resets, frames))
        if state is not None and (unknown := state.keys() - carry.after.keys()):
            raise ValueError(f"state: unknown tensors {', '.join(sorted(unknown))}")
        return outputs, carry.after

    @abstractmethod
    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        """The outputs (T, B, num_classes)."""

    def _checked_resets(self, resets: Mapping[str, Tensor] | None, frames: Tensor) -> Mapping[str, Tensor]:
        resets = resets or {}
        for name, schedule in resets.items():
            if name not in self.scales:
                raise ValueError(f"resets: unknown scale {name!r}; this model has {', '.join(self.scales) or 'none'}")
            if schedule.dtype != torch.bool or schedule.shape != frames.shape[:2]:
                raise ValueError(
                    f"resets: expected a boolean (T, B) = {tuple(frames.shape[:2])} for scale {name!r}, "
                    f"got {schedule.dtype} of shape {tuple(schedule.shape)}"
                )
        return resets


def _valid_steps(frames: Tensor, lengths: Tensor | None) -> Tensor | None:
    """(T, B) boolean, or None if every step of every sample is valid."""
    if lengths is None:
        return None
    steps, batch = frames.shape[:2]
    if lengths.shape != (batch,) or lengths.device.type != "cpu" or lengths.dtype.is_floating_point:
        raise ValueError(
            f"lengths: expected {batch} integers on the CPU, got {lengths.dtype} of shape {tuple(lengths.shape)} on "
            f"{lengths.device}"
        )
    if int(lengths.min()) < 0 or int(lengths.max()) > steps:
        raise ValueError(f"lengths: expected values from 0 to T = {steps}, got {lengths.tolist()}")
    if int(lengths.min()) == steps:
        return None
    if int(lengths.max()) == 0:
        raise ValueError("lengths: expected at least one sample with a valid step, got zeros alone")
    return (torch.arange(steps)[:, None] < lengths).to(frames.device)
