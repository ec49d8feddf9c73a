"""Hypothesis strategies over sequence calls, for the kernels of every backend."""

from __future__ import annotations

from typing import Any

from cases import Case
from hypothesis import assume
from hypothesis import strategies as st

from fused_convlstm import functional as FC
from fused_convlstm.backends.call import same_padding


@st.composite
def cases(draw: Any, cell: str, max_channels: int = 300, max_work: float = 3e7, max_size: int = 12) -> Case:
    """Any valid call of ``cell``, up to ``max_work`` multiply-adds in its convolutions.

    Odd sizes, H or W of 1, kernels larger than the image, an empty batch, T = 1, channels from 1 up, every option and
    memory layout.
    """
    small = st.integers(1, 3)
    kernel = st.sampled_from([1, 1, 2, 3, 3, 3, 4, 5])
    channels = st.one_of(
        st.integers(1, 20), st.sampled_from([16, 31, 32, 33, 48, 63, 64, 65]), st.integers(1, max_channels)
    )
    size = st.one_of(st.just(1), st.integers(1, max_size))
    kernel_size, recurrent = draw(st.tuples(kernel, kernel)), draw(st.tuples(kernel, kernel))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3])) if cell == "conv_lstm2d" else 1
    side = st.integers(0, 2)
    padding = draw(
        st.one_of(st.sampled_from(["same", "same", "valid"]), st.tuples(st.tuples(side, side), st.tuples(side, side)))
    )
    case = Case(
        cell=cell,
        steps=draw(st.integers(1, 4)),
        batch=draw(st.sampled_from([0, 1, 1, 2, 3, 7])),
        in_channels=_multiple(draw(channels), groups),
        hidden_channels=_multiple(draw(channels), groups),
        size=draw(st.tuples(size, size)),
        kernel_size=kernel_size,
        recurrent_kernel_size=recurrent,
        stride=draw(st.one_of(st.just((1, 1)), st.tuples(small, small))),
        padding=padding,
        dilation=draw(st.one_of(st.just((1, 1)), st.tuples(small, small))),
        recurrent_dilation=draw(st.one_of(st.just((1, 1)), st.tuples(small, small))),
        groups=groups,
        padding_mode=draw(st.sampled_from(["zeros", "zeros", "circular", "replicate", "reflect"])),
        gate_activation=draw(st.sampled_from(["sigmoid", "sigmoid", "hard_sigmoid", "hard_sigmoid_keras2"])),
        reverse=draw(st.booleans()),
        bias=draw(st.booleans()),
        peephole=draw(st.sampled_from(["none", "none", "channel", "pixel"])) if cell == "conv_lstm2d" else "none",
        state=draw(st.booleans()),
        lengths=draw(st.booleans()),
        reset=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "channels_last", "batch_major", "sliced", "expanded"])),
        recompute_gates=draw(st.booleans()),
        seed=draw(st.integers(0, 999)),
    )
    assume(_valid(case))
    assume(_work(case) <= max_work)
    return case


def _multiple(channels: int, groups: int) -> int:
    return -(-channels // groups) * groups


def _valid(case: Case) -> bool:
    """Whether the frames are large enough for kernel and padding."""
    state = case.state_size()
    if min(state) < 1:
        return False
    if case.padding_mode in ("circular", "reflect"):
        less = 1 if case.padding_mode == "reflect" else 0
        padding = FC.resolve_padding(case.padding, case.kernel_size, case.dilation)  # type: ignore[arg-type]
        recurrent = same_padding(case.recurrent_kernel_size, case.recurrent_dilation)
        for size, pad in ((case.size, padding), (state, recurrent)):
            if max(pad[:2]) > size[0] - less or max(pad[2:]) > size[1] - less:
                return False
    return True


def _work(case: Case) -> float:
    height, width = case.state_size()
    taps = case.in_channels * case.kernel_size[0] * case.kernel_size[1]
    taps += case.hidden_channels * case.recurrent_kernel_size[0] * case.recurrent_kernel_size[1]
    return 4.0 * case.hidden_channels / case.groups * taps * height * width * case.steps * case.batch
