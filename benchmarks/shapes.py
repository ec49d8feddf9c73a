"""The shapes that are measured, and what they cost at least."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """B batch, T steps, in -> hidden channels, height x width of the input, square kernel."""

    name: str
    batch: int
    steps: int
    in_channels: int
    hidden_channels: int
    height: int
    width: int
    kernel: int
    stride: int = 1

    @property
    def state_size(self) -> tuple[int, int]:
        return -(-self.height // self.stride), -(-self.width // self.stride)

    @property
    def flops(self) -> float:
        """Floating-point operations of the direct convolutions of a forward pass, padding included."""
        height, width = self.state_size
        taps = self.kernel**2 * (self.in_channels + self.hidden_channels)
        return 2.0 * self.batch * self.steps * height * width * 4 * self.hidden_channels * taps

    @property
    def training_flops(self) -> float:
        """Forward, data gradient, weight gradient: three times the forward pass."""
        return 3 * self.flops

    @property
    def pooled_gate_flops(self) -> float:
        """Floating-point operations of a forward pass of the pooled-gate cell."""
        height, width = self.state_size
        channels = self.in_channels + self.hidden_channels
        per_pixel = 2.0 * channels * (self.kernel**2 + self.hidden_channels)
        return self.batch * self.steps * (height * width * per_pixel + 2.0 * channels * 3 * self.hidden_channels)


SHAPES = (
    Shape("lip24", 8, 24, 64, 64, 24, 24, 3),
    Shape("lip12", 8, 24, 128, 128, 12, 12, 3),
    Shape("lip6", 8, 24, 256, 256, 6, 6, 3),
    Shape("lip3", 8, 24, 256, 256, 3, 3, 3),
    Shape("skip", 8, 24, 64, 128, 24, 24, 1, stride=2),
    Shape("gesture", 2, 8, 256, 256, 28, 28, 3),
    Shape("nowcast", 4, 20, 1, 16, 64, 64, 3),
    Shape("moving-digits", 4, 10, 64, 64, 64, 64, 3),
    Shape("k5", 4, 10, 16, 64, 32, 32, 5),
    Shape("stream", 1, 1, 64, 64, 24, 24, 3),  # one frame with the state of the one before
)

# Batch sizes on a GPU: 32 clips for the lip shapes, 16 clips of 16 frames for gesture.
GPU_SHAPES = (
    Shape("lip24", 32, 24, 64, 64, 24, 24, 3),
    Shape("lip12", 32, 24, 128, 128, 12, 12, 3),
    Shape("lip6", 32, 24, 256, 256, 6, 6, 3),
    Shape("lip3", 32, 24, 256, 256, 3, 3, 3),
    Shape("skip", 32, 24, 64, 128, 24, 24, 1, stride=2),
    Shape("gesture", 16, 16, 256, 256, 28, 28, 3),
    Shape("nowcast", 32, 20, 1, 16, 64, 64, 3),
    Shape("moving-digits", 16, 20, 64, 64, 64, 64, 3),
    Shape("k5", 16, 20, 16, 64, 32, 32, 5),
    Shape("stream", 1, 1, 64, 64, 24, 24, 3),
)

# The shapes that the pooled-gate cell is measured on.
POOLED_GATE_SHAPES = tuple(shape for shape in SHAPES if shape.name in ("lip24", "lip12", "lip6", "gesture", "nowcast"))
