"""Device functions that the kernels of both cells share."""

# ruff: noqa: SIM108 (branches on compile-time constants)
from __future__ import annotations

import triton
import triton.language as tl

# How a neighbour outside the frame is read, in the order of PADDING_MODES.
PADDING_MODES = ("zeros", "circular", "replicate", "reflect")
GATE_ACTIVATIONS = ("sigmoid", "hard_sigmoid", "hard_sigmoid_keras2")


@triton.jit
def tanh(x, ACCURATE: tl.constexpr):
    """tanh by exp; with ACCURATE by a Taylor polynomial near 0, where 1 - exp(-2|x|) would cancel.

    The interpreter has no libdevice."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    y = (1.0 - e) / (1.0 + e)
    if ACCURATE:
        s = x * x
        p = 62.0 / 2835.0 + s * (-1382.0 / 155925.0)
        p = 1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * p)))
        y = tl.where(a < 0.3, a * p, y)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def gate(x, ACTIVATION: tl.constexpr):
    """The gate activation: an index into GATE_ACTIVATIONS."""
    if ACTIVATION == 0:
        y = 1.0 / (1.0 + tl.exp(-x))
    else:
        if ACTIVATION == 1:
            y = x * (1.0 / 6.0) + 0.5
        else:
            y = x * 0.2 + 0.5
        # Comparisons rather than minimum and maximum: those would drop a NaN.
        y = tl.where(y < 0.0, 0.0, tl.where(y > 1.0, 1.0, y))
    return y


@triton.jit
def gate_to_store(y, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """The gate as it is kept for backward, which reads the slope off it: a hard sigmoid strictly between 0 and 1 must
    not be rounded to either."""
    if ACTIVATION != 0 and dtype != tl.float32:
        HIGH: tl.constexpr = 1.0 - 2.0**-11 if dtype == tl.float16 else 1.0 - 2.0**-8
        inside = (y > 0.0) & (y < 1.0)
        y = tl.where(inside & (y < 2.0**-14), 2.0**-14, tl.where(inside & (y > HIGH), HIGH, y))
    return y.to(dtype)


@triton.jit
def gate_slope(y, ACTIVATION: tl.constexpr):
    """Derivative of the gate activation, from its value."""
    if ACTIVATION == 0:
        slope = y * (1.0 - y)
    elif ACTIVATION == 1:
        slope = tl.where((y > 0.0) & (y < 1.0), 1.0 / 6.0, 0.0)
    else:
        slope = tl.where((y > 0.0) & (y < 1.0), 0.2, 0.0)
    return slope


@triton.jit
def neighbour(p, size, MODE: tl.constexpr):
    """The coordinate that is read for ``p``, which may lie outside [0, size); MODE indexes PADDING_MODES.

    For zeros, ``p`` itself: the caller masks."""
    if MODE == 1:
        p = tl.where(p < 0, p + size, tl.where(p >= size, p - size, p))
    elif MODE == 2:
        p = tl.minimum(tl.maximum(p, 0), size - 1)
    elif MODE == 3:
        p = tl.abs(p)
        p = tl.where(p >= size, 2 * size - 2 - p, p)
    return p


@triton.jit
def split_gates(acc, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, 4 * BN) with the gate outside the channel -> four times (BM, BN)."""
    acc = tl.permute(tl.reshape(acc, (BM, 2, 2, BN)), (0, 3, 1, 2))
    even, odd = tl.split(acc)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def halves(x, BM: tl.constexpr, BN: tl.constexpr):
    """(BM, BN) -> its left and its right half, (BM, BN / 2) each.

    An epilogue that goes through halves keeps fewer registers; and after a split the compiler brings the accumulator
    to the layout of the loads, rather than every load to that of the accumulator."""
    return tl.split(tl.permute(tl.reshape(x, (BM, 2, BN // 2)), (0, 2, 1)))
