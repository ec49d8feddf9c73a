"""What a call of either cell is to the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import ConvLSTMOptions, state_dtype
from ..frames import nhwc
from .parameters import GATE_ACTIVATIONS, Kernels, StepTables, address, contiguous_nhwc, in_chunks


class SequenceProblem:
    """Sizes, state and flags of a call."""

    def __init__(
        self,
        kernels: Kernels,
        input: Tensor,  # (T, B, Cin, H, W)
        c_0: Tensor | None,  # (B, C, Ho, Wo)
        channels: int,
        size: tuple[int, int],  # (Ho, Wo)
        step_flags: Tensor | None,  # (T, B)
        options: ConvLSTMOptions,
    ) -> None:
        self.kernels, self.options, self.input, self.step_flags = kernels, options, input, step_flags
        self.c_0 = None if c_0 is None else contiguous_nhwc(c_0)
        self.tables = None if step_flags is None else StepTables.of(step_flags, options.reverse)
        self.steps, self.batch = input.size(0), input.size(1)
        self.channels = channels
        self.height, self.width = size
        self.empty = self.batch * self.height * self.width == 0

    def frames(self, steps: int, channels: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised (steps, B, Ho, Wo, channels)."""
        shape = (steps, self.batch, self.height, self.width, channels)
        return self.input.new_empty(shape, dtype=dtype or self.input.dtype)

    def running_c(self) -> Tensor:  # (B, Ho, Wo, C) in the type of the state
        """Room for c, which the kernels take from step to step and leave as that of the last one."""
        c = self.frames(1, self.channels, state_dtype(self.input.dtype))[0]
        if self.tables is not None:  # an image without a valid step is never written
            c.zero_() if self.c_0 is None else c.copy_(self.c_0)
        return c

    def frame_bytes(self, channels: int) -> int:
        """Bytes of a step of that many channels."""
        return self.batch * self.height * self.width * channels * self.input.element_size()

    def counters(self) -> Tensor:  # (B,) int32
        """Room for what groups of blocks count; zeroed by the launchers."""
        return self.input.new_empty((self.batch,), dtype=torch.int32)

    def sequence_block(self) -> Any:
        """The ``Sequence`` block of the call, without peepholes."""
        s = self.kernels.module.Sequence()
        s.device, s.stream, s.tile = self.kernels.device, self.kernels.stream, self.kernels.tile
        s.steps, s.batch, s.channels = self.steps, self.batch, self.channels
        s.height, s.width = self.height, self.width
        s.reverse = self.options.reverse
        s.gate_activation = GATE_ACTIVATIONS.index(self.options.gate_activation)
        s.c_0 = address(self.c_0)
        s.source = 0 if self.tables is None else address(self.tables.source)
        return s

    def initial_in_chunks(self, h_0: Tensor | None) -> Tensor | None:  # (B, C, Ho, Wo) -> (B, Ho, Wo, whole chunks)
        return None if h_0 is None else in_chunks(h_0[None])[0].contiguous()

    def last(self, frames: Tensor, initial: Tensor | None) -> Tensor:  # (T, B, Ho, Wo, C) -> (B, Ho, Wo, C)
        """The state after the last step of each image; ``initial`` is (B, C, Ho, Wo)."""
        if self.tables is None:
            return frames[0 if self.options.reverse else -1]
        index = self.tables.last
        taken = frames[index.clamp(min=0), torch.arange(self.batch, device=frames.device)]
        none = torch.zeros_like(taken) if initial is None else nhwc(initial)
        return torch.where((index >= 0)[:, None, None, None], taken, none)
