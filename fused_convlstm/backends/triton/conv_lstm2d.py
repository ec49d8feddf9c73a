"""The ConvLSTM over a sequence: one launch a step, everything else batched over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._sequence import empty_gradient
from ...ops.layout import empty_frames_like, empty_state_like, frames_are_channels_last
from ..call import (
    SAVE_GATES,
    SAVE_NOTHING,
    ConvLSTMOptions,
    conv_output_size,
    kept_cells_dtype,
    same_padding,
    state_dtype,
)
from ..frames import (
    FLAT_CHANNELS,
    Sum,
    chunk_steps,
    chunks,
    convolution_backward,
    frames_nchw,
    frames_of,
    input_frames,
    masked_frames,
    nchw,
    nhwc,
    pad_frames,
    previous_frames,
    unpad_gradient,
)
from . import tuning
from ._conv_lstm2d_kernels import conv_lstm2d_backward_kernel, conv_lstm2d_forward_kernel
from ._device import GATE_ACTIVATIONS, PADDING_MODES
from .launch import StepLauncher, convolution_precision, passes_int32, rounded
from .tile import Tile


def group_major(weight: Tensor, groups: int) -> Tensor:
    """(4 * C, ...), gates outside the groups -> gates inside the groups, as grouped convolutions want them."""
    if groups == 1:
        return weight
    grouped: Tensor = weight.unflatten(0, (4, groups, -1)).transpose(0, 1).flatten(0, 2)
    return grouped


def gate_major(weight: Tensor, groups: int) -> Tensor:
    """The inverse of :func:`group_major`."""
    if groups == 1:
        return weight
    plain: Tensor = weight.unflatten(0, (groups, 4, -1)).transpose(0, 1).flatten(0, 2)
    return plain


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pack_forward(weight: Tensor, groups: int, bn: int, bk: int, flat: bool = False) -> Tensor:
    """(4 * C, K, kh, kw) -> (taps, G, NB, 4 * BN, KP): what one program reads lies together, k innermost.

    Columns are (gate, channel) within a block of BN channels. With ``flat``, (G, NB, 4 * BN, KP) and k runs over
    (tap, channel). What pads the dimensions is zero."""
    channels, inner = weight.size(0) // 4 // groups, weight.size(1)
    taps = weight.size(2) * weight.size(3)
    blocks = -(-channels // bn)
    w = weight.reshape(4, groups, channels, inner, taps)
    if flat:
        w = w.transpose(3, 4).reshape(4, groups, channels, taps * inner, 1)
        inner, taps = taps * inner, 1
    depth = padded(inner, bk)
    fits = depth == inner and channels % bn == 0
    packed = (weight.new_empty if fits else weight.new_zeros)((taps, groups, blocks, 4, bn, depth))
    source = w.permute(4, 1, 2, 0, 3)  # (taps, G, channels, 4, K)
    whole = channels // bn
    if whole:
        block = source[:, :, : whole * bn].unflatten(2, (whole, bn))
        packed[:, :, :whole, :, :, :inner] = block.transpose(3, 4)
    if channels % bn:
        packed[:, :, whole, :, : channels % bn, :inner] = source[:, :, whole * bn :].transpose(2, 3)
    return packed


def pack_backward(weight: Tensor, groups: int, bn: int, bk: int) -> Tensor:
    """(4 * C, K, kh, kw) -> (taps, G, NB * BN, KP): rows are input channels, k runs over (gate, output channel)."""
    channels, inner = weight.size(0) // 4 // groups, weight.size(1)
    taps = weight.size(2) * weight.size(3)
    size = (padded(inner, bn), padded(4 * channels, bk))
    packed = (weight.new_empty if size == (inner, 4 * channels) else weight.new_zeros)((taps, groups, *size))
    source = weight.reshape(4, groups, channels, inner, taps).permute(4, 1, 3, 0, 2)  # (taps, G, K, 4, channels)
    packed[:, :, :inner, : 4 * channels].unflatten(3, (4, channels)).copy_(source)
    return packed


def peephole_rows(peephole: Tensor | None) -> tuple[int, Tensor | None]:
    """0: none, 1: (3, C), 2: (3, H, W, C), and the weights in that shape."""
    if peephole is None:
        return 0, None
    return (1, peephole.contiguous()) if peephole.dim() == 2 else (2, nhwc(peephole).contiguous())


class _Problem:
    """What forward, recomputation and backward of one call share."""

    def __init__(
        self,
        input: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        options: ConvLSTMOptions,
    ) -> None:
        self.input, self.weight_ih, self.weight_hh, self.options = input, weight_ih, weight_hh, options
        self.bias = None if bias is None else bias.contiguous()
        self.peephole_kind, self.peephole = peephole_rows(peephole)
        self.steps, self.batch = input.size(0), input.size(1)
        self.height, self.width = conv_output_size(
            (input.size(3), input.size(4)),
            (weight_ih.size(2), weight_ih.size(3)),
            options.stride,
            options.padding,
            options.dilation,
        )
        self.channels, self.groups = weight_ih.size(0) // 4, options.groups
        self.group_channels = self.channels // self.groups
        self.rows = self.batch * self.height * self.width
        self.padding = same_padding((weight_hh.size(2), weight_hh.size(3)), options.recurrent_dilation)
        self.precision = convolution_precision(input.dtype)
        self.grouped_weight_ih = group_major(weight_ih, self.groups)

    @property
    def chunk(self) -> int:
        """Steps of a time chunk whose buffers are 4 * C wide."""
        return chunk_steps(self.steps, self.rows * 4 * self.channels * self.input.element_size())

    def order(self) -> range:
        """The steps in the order in which they are computed."""
        return range(self.steps - 1, -1, -1) if self.options.reverse else range(self.steps)

    def frames(self, *shape: int, dtype: torch.dtype) -> Tensor:  # (*shape, B, H, W, C)
        return self.input.new_empty((*shape, self.batch, self.height, self.width, self.channels), dtype=dtype)

    def padded_input(self, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:  # (n, B, Cin, H, W) -> (n * B, ...)
        return pad_frames(frames_nchw(frames), self.options.padding, self.options.padding_mode)

    def input_part(self, begin: int, end: int) -> Tensor:  # (end - begin, B * H * W, 4 * C), group-major
        """The convolution of the frames [begin, end), through PyTorch."""
        o = self.options
        frames, padding = self.padded_input(self.input[begin:end])
        z = F.conv2d(frames, self.grouped_weight_ih, None, o.stride, padding, o.dilation, o.groups)
        return nhwc(z).contiguous().view(end - begin, self.rows, 4 * self.channels)

    def forward_tile(self, rows: int, fused_input: bool, run: Callable[[Tile], Callable[[], object]]) -> Tile:
        problem = (*self.weight_hh.shape[1:], *(self.weight_ih.shape[1:] if fused_input else ()))
        return tuning.choose(
            tuning.FORWARD, self.input.device, self.input.dtype, self.precision, 1, rows, self.group_channels,
            self.groups, problem, run,
        )  # fmt: skip

    def forward_step(
        self,
        tile: Tile,
        batch: int,  # frames of a launch
        *,
        packed: Tensor | None,  # weight_hh; with h
        z: Tensor | None = None,  # (n, rows, 4 * C)
        x: Tensor | None = None,  # (n, B, Cin, Hin, Win)
        x_packed: Tensor | None = None,
        x_padding: tuple[int, int] = (0, 0),
        h: Tensor | None = None,  # (n, B, H, W, C)
        c: Tensor | None = None,  # (1, B, H, W, C)
        c_out: Tensor | None = None,  # (1, B, H, W, C)
        cells: Tensor | None = None,  # (T, B, H, W, C)
        h_out: Tensor | None = None,  # (n, B, H, W, C); None: gates only
        out: Tensor | None = None,  # (T, B, C, H, W)
        gates: Tensor | None = None,  # (n, rows, 4 * C)
        flags: Tensor | None = None,  # (T, B)
    ) -> StepLauncher:
        """A launcher of the forward kernel, called with (t, in_t, h_t, h_out_t)."""
        o = self.options
        rows = batch * self.height * self.width
        kh, kw = self.weight_ih.shape[2:]
        rh, rw = self.weight_hh.shape[2:]
        inner = self.weight_ih.size(1)
        flat, x_depth = self.input_depth(tile)
        depth = self.depth(tile)
        x_stride = (0,) * 5 if x is None else x.stride()
        h_stride = (0, 0) if h is None else h.stride()
        h_out_stride = (0, 0) if h_out is None else h_out.stride()
        out_stride = (0,) * 5 if out is None else out.stride()
        arguments: dict[str, Any] = {
            "z_ptr": z, "x_ptr": x, "wx_ptr": x_packed, "h_ptr": h, "wh_ptr": packed, "bias_ptr": self.bias,
            "peephole_ptr": self.peephole, "flags_ptr": flags, "c_ptr": c, "c_out_ptr": c_out, "cells_ptr": cells,
            "h_out_ptr": h_out, "out_ptr": out, "gates_ptr": gates, "M": rows, "H": self.height, "W": self.width,
            "x_stride_t": x_stride[0], "x_stride_b": x_stride[1], "x_stride_c": x_stride[2],
            "x_stride_y": x_stride[3], "x_stride_x": x_stride[4],
            "Hin": 0 if x is None else x.size(3), "Win": 0 if x is None else x.size(4),
            "h_stride_t": h_stride[0], "h_stride_b": h_stride[1],
            "h_out_stride_t": h_out_stride[0], "h_out_stride_b": h_out_stride[1],
            "out_stride_t": out_stride[0], "out_stride_b": out_stride[1], "out_stride_c": out_stride[2],
            "out_stride_p": out_stride[4], "B": batch, "CG": self.group_channels, "G": self.groups,
            "RH": rh, "RW": rw, "DIL_H": o.recurrent_dilation[0], "DIL_W": o.recurrent_dilation[1],
            "PAD_H": self.padding[0], "PAD_W": self.padding[2],
            "PADDING_MODE": PADDING_MODES.index(o.padding_mode),
            "XCG": inner, "XKH": kh, "XKW": kw, "XSTRIDE_H": o.stride[0], "XSTRIDE_W": o.stride[1],
            "XDIL_H": o.dilation[0], "XDIL_W": o.dilation[1], "XPAD_H": x_padding[0], "XPAD_W": x_padding[1],
            "KP": padded(self.group_channels, depth), "XKP": padded(inner * kh * kw if flat else inner, x_depth),
            "HAS_Z": z is not None, "HAS_X": x is not None, "X_FLAT": flat, "HAS_H": h is not None,
            "HAS_C": c is not None, "HAS_BIAS": self.bias is not None, "PEEPHOLE": self.peephole_kind,
            "HAS_FLAGS": flags is not None, "OUT": 0 if out is None else 1 if out.stride(2) == 1 else 2,
            "SAVE_CELLS": cells is not None, "SAVE_GATES": gates is not None, "GATES_ONLY": h_out is None,
            "ACTIVATION": GATE_ACTIVATIONS.index(o.gate_activation),
            "ACCURATE": self.input.dtype == torch.float32, "PRECISION": self.precision,
            "WIDE": rows * 4 * self.channels >= 2**31 or passes_int32(x, h, h_out, out),
            "SLICES": 2 if tile.bn >= 64 else 1, "BM": tile.bm, "BN": tile.bn, "BK": depth, "XBK": x_depth,
        }  # fmt: skip
        programs = -(-rows // tile.bm) * -(-self.group_channels // tile.bn) * self.groups
        varying = ("t", "in_t", "h_t", "h_out_t")
        return StepLauncher(conv_lstm2d_forward_kernel, programs, arguments, varying, tile)

    def depth(self, tile: Tile) -> int:
        return tuning.depth(tile, self.group_channels, self.input.element_size())

    def input_depth(self, tile: Tile) -> tuple[bool, int]:
        """Whether taps and channels of x are one dimension of the dot, and its depth."""
        inner, taps = self.weight_ih.size(1), self.weight_ih.size(2) * self.weight_ih.size(3)
        flat = inner < FLAT_CHANNELS
        return flat, tuning.depth(tile, inner * taps if flat else inner, self.input.element_size())

    def gates_of(
        self,
        begin: int,
        end: int,
        h_before: Tensor,  # (end - begin, B, H, W, C)
        c_before: Tensor | None,  # the same; with peepholes
        cells: Tensor,  # (T, B, H, W, C)
        gates: Tensor,  # (end - begin, rows, 4 * C)
    ) -> None:
        """Recomputes the gates of the steps [begin, end) into ``gates``: one launch, every state being known."""
        count = end - begin
        z = self.input_part(begin, end)

        def step(tile: Tile) -> StepLauncher:
            packed = pack_forward(rounded(self.weight_hh, self.precision), self.groups, tile.bn, self.depth(tile))
            return self.forward_step(
                tile, count * self.batch, packed=packed, z=z, h=h_before.flatten(0, 1)[None],
                c=c_before if c_before is None else c_before.flatten(0, 1)[None],
                cells=cells[begin:end].flatten(0, 1)[None], gates=gates,
            )  # fmt: skip

        def trial(tile: Tile) -> Callable[[], object]:
            launch = step(tile)
            return lambda: launch(0, 0, 0, 0)

        step(self.forward_tile(count * self.rows, False, trial))(0, 0, 0, 0)


def forward(
    input: Tensor,  # (T, B, Cin, H, W)
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    step_flags: Tensor | None,
    options: ConvLSTMOptions,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`fused_convlstm.backends.base.Backend.conv_lstm2d`."""
    p = _Problem(input, weight_ih, weight_hh, bias, peephole, options)
    dtype, c_type = input.dtype, state_dtype(input.dtype)
    fused_input = save == SAVE_NOTHING
    output = empty_frames_like(input, p.channels, p.height, p.width)
    h_n = empty_state_like(input, p.channels, p.height, p.width, dtype)
    c_n = empty_state_like(input, p.channels, p.height, p.width, c_type)
    gates = input.new_empty((p.steps, p.rows, 4 * p.channels) if save == SAVE_GATES else (0,))
    cells_dtype = kept_cells_dtype(dtype, peephole is not None)
    cells = input.new_empty((0,), dtype=cells_dtype) if save == SAVE_NOTHING else p.frames(p.steps, dtype=cells_dtype)
    gates_shape = (p.steps, p.batch, p.height, p.width, 4 * p.channels)
    if p.rows == 0:
        return output, h_n, c_n, gates.view(gates_shape) if save == SAVE_GATES else gates, cells
    # The output is the state of the next step if its channels lie together and no step hides the state.
    direct = frames_are_channels_last(input) and step_flags is None
    states = nhwc(output) if direct else p.frames(2, dtype=dtype)
    c_state = p.frames(1, dtype=c_type)  # in place
    h_first, c_first = frames_of(h_0, dtype), frames_of(c_0, c_type)

    def prepare(tile: Tile, source: Tensor, x_padding: tuple[int, int]) -> Callable[[bool], StepLauncher]:
        """The launcher of the first step (True), or of the others (False)."""
        x = x_packed = None
        z: Tensor | None = source
        if fused_input:
            x, z = source, None
            flat, x_depth = p.input_depth(tile)
            x_packed = pack_forward(rounded(weight_ih, p.precision), p.groups, tile.bn, x_depth, flat)
        packed = None
        if h_0 is not None or p.steps > 1:
            packed = pack_forward(rounded(weight_hh, p.precision), p.groups, tile.bn, p.depth(tile))

        def launcher(first: bool) -> StepLauncher:
            h, c = (h_first, c_first) if first else (states, c_state)
            return p.forward_step(
                tile, p.batch, packed=None if h is None else packed, z=z, x=x, x_packed=x_packed,
                x_padding=x_padding, h=h, c=c, c_out=c_state, cells=None if save == SAVE_NOTHING else cells,
                h_out=states, out=None if direct else output, gates=gates if save == SAVE_GATES else None,
                flags=step_flags,
            )  # fmt: skip

        return launcher

    launchers: list[StepLauncher] = []  # of the first step, and of the others
    before = 0  # the step computed last
    position = 0  # of the step in the order of computation
    for begin, end, source, x_padding in _sources(p, fused_input):
        if not launchers:

            def trial(
                tile: Tile, source: Tensor = source, x_padding: tuple[int, int] = x_padding
            ) -> Callable[[], None]:
                launch = prepare(tile, source, x_padding)(p.steps == 1)
                return lambda: launch(0, 0, 0, 0)

            launcher = prepare(p.forward_tile(p.rows, fused_input, trial), source, x_padding)
            launchers = [launcher(True), launcher(False)] if p.steps > 1 else [launcher(True)]
            del trial, launcher  # which keep the first chunk's source
        else:
            for launch in launchers:
                launch.bind("x_ptr" if fused_input else "z_ptr", source)
        for t in reversed(range(begin, end)) if options.reverse else range(begin, end):
            h_out = t if direct else position % 2
            later = min(position, 1)
            h = 0 if position == 0 else before if direct else (position - 1) % 2
            launchers[later](t, t - begin, h, h_out)
            before = t
            position += 1
    h_n.copy_(nchw(states[before if direct else (position - 1) % 2]))
    c_n.copy_(nchw(c_state[0]))
    return output, h_n, c_n, gates.view(gates_shape) if save == SAVE_GATES else gates, cells


def _sources(p: _Problem, fused_input: bool) -> Iterator[tuple[int, int, Tensor, tuple[int, int]]]:
    """Time chunks in the order of computation: begin, end, and what the kernel reads of the input there: the
    pre-activations' input part, or the frames (n, B, Cin, H, W) and the zero padding that is left to do."""
    if fused_input:
        yield from input_frames(p.input, p.options, p.chunk)
        return
    for begin, end in chunks(p.steps, p.chunk, p.options.reverse):
        yield begin, end, p.input_part(begin, end), (0, 0)


def backward(
    grad_output: Tensor | None,  # (T, B, C, Ho, Wo)
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    step_flags: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    options: ConvLSTMOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """See :meth:`fused_convlstm.backends.base.Backend.conv_lstm2d_backward`."""
    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias, peephole)
    grads = [
        empty_gradient(k, tensor, input) if need and tensor is not None else None
        for k, (tensor, need) in enumerate(zip(arguments, needs, strict=True))
    ]
    _, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole = grads
    p = _Problem(input, weight_ih, weight_hh, bias, peephole, options)
    if p.rows == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads)
    dtype, c_type = input.dtype, state_dtype(input.dtype)
    width = 4 * p.channels
    recompute = gates.numel() == 0
    h_states = nhwc(output)
    h_first, c_first = frames_of(h_0, dtype), frames_of(c_0, c_type)

    length = p.chunk
    if recompute:
        gates = input.new_empty((length, p.rows, width))  # of a chunk
    dz = input.new_empty((length + 1, p.rows, width))  # of a chunk, and of the step computed before it
    dc = p.frames(dtype=c_type)
    dc.zero_() if grad_c_n is None else dc.copy_(nhwc(grad_c_n))
    carry = None
    if grad_h_n is not None or step_flags is not None:
        carry = p.frames(dtype=torch.float32)
        carry.zero_() if grad_h_n is None else carry.copy_(nhwc(grad_h_n))
    dh = p.frames(dtype=dtype) if grad_h_0 is not None else None

    def prepare(tile: Tile) -> Callable[[bool, bool, bool], StepLauncher]:
        depth = tuning.depth(tile, 4 * p.group_channels, input.element_size())
        packed = pack_backward(rounded(weight_hh, p.precision), p.groups, tile.bn, depth)

        def launcher(conv: bool, cell: bool, initial: bool) -> StepLauncher:
            go = grad_output if cell else None
            go_stride = (0,) * 5 if go is None else go.stride()
            c_before = c_first if initial else cells
            use_carry = step_flags is not None or (not conv and carry is not None)
            arguments: dict[str, Any] = {
                "dz_ptr": dz, "w_ptr": packed, "grad_output_ptr": go, "carry_ptr": carry if use_carry else None,
                "dc_ptr": dc, "gates_ptr": gates if cell else None, "c_ptr": cells, "c_before_ptr": c_before,
                "peephole_ptr": p.peephole, "flags_ptr": step_flags, "dh_ptr": None if cell else dh, "M": p.rows,
                "H": p.height, "W": p.width, "go_stride_t": go_stride[0], "go_stride_b": go_stride[1],
                "go_stride_c": go_stride[2], "go_stride_y": go_stride[3], "go_stride_x": go_stride[4], "B": p.batch,
                "CG": p.group_channels, "G": p.groups, "K": 4 * p.group_channels, "RH": weight_hh.size(2),
                "RW": weight_hh.size(3), "DIL_H": options.recurrent_dilation[0],
                "DIL_W": options.recurrent_dilation[1], "PAD_H": p.padding[0], "PAD_W": p.padding[2],
                "PADDING_MODE": PADDING_MODES.index(options.padding_mode), "KP": packed.size(3), "CONV": conv,
                "CELL": cell, "CARRY": use_carry, "HAS_C": c_before is not None,
                "GRAD_OUTPUT": 0 if go is None else 1 if go_stride[2] == 1 else 2, "PEEPHOLE": p.peephole_kind,
                "HAS_FLAGS": step_flags is not None, "ACTIVATION": GATE_ACTIVATIONS.index(options.gate_activation),
                "ACCURATE": dtype == torch.float32, "PRECISION": p.precision,
                "WIDE": p.rows * width >= 2**31 or passes_int32(grad_output),
                "SLICES": 4 if tile.bn >= 128 else 2 if tile.bn >= 32 else 1, "BM": tile.bm, "BN": tile.bn, "BK": depth,
            }  # fmt: skip
            programs = -(-p.rows // tile.bm) * -(-p.group_channels // tile.bn) * p.groups
            varying = ("t", "t_after", "dz_t", "dz_out_t", "gates_t", "c_before_t")
            return StepLauncher(conv_lstm2d_backward_kernel, programs, arguments, varying, tile)

        return launcher

    sums = {name: Sum() for name in ("weight_ih", "weight_hh", "bias", "peephole")}
    order = p.order()
    first_step, last_step = order[0], order[-1]
    launchers: dict[tuple[bool, bool], StepLauncher] = {}
    launcher = None
    step_after = 1 if not options.reverse else -1  # t + step_after comes after t
    for begin, end in chunks(p.steps, length, backward=not options.reverse):
        count = end - begin
        # Step t of the chunk lies in frame t - begin + offset of dz, next to it the step that was computed before.
        offset = 1 if options.reverse else 0
        h_before = c_before = None
        if recompute or grad_weight_hh is not None:
            h_before = previous_frames(h_states, h_first, step_flags, begin, end, options.reverse)
        if peephole is not None and (recompute or grad_peephole is not None):
            c_before = previous_frames(cells, c_first, step_flags, begin, end, options.reverse)
        if recompute:
            assert h_before is not None
            p.gates_of(begin, end, h_before, c_before, cells, gates[:count])
        gates_begin = begin if recompute else 0
        if launcher is None:

            def trial(tile: Tile) -> Callable[[], None]:
                launch = prepare(tile)(True, True, False)
                return lambda: launch(0, 0, 0, 0, 0, 0)

            # Autotuning may launch the kernel, which would change these.
            kept = [x.clone() for x in (dc, carry) if x is not None and tuning.enabled()]
            tile = tuning.choose(
                tuning.BACKWARD, input.device, dtype, p.precision, 1, p.rows, p.group_channels, p.groups,
                tuple(weight_hh.shape[1:]), trial,
            )  # fmt: skip
            for x, value in zip((dc, carry), kept, strict=False):
                x.copy_(value)  # type: ignore[union-attr]
            launcher = prepare(tile)
        for t in range(begin, end) if options.reverse else reversed(range(begin, end)):
            key = (t != last_step, t == first_step)
            if key not in launchers:
                launchers[key] = launcher(key[0], True, key[1])
            after = t + step_after
            launchers[key](
                t, after, after - begin + offset, t - begin + offset, t - gates_begin, 0 if key[1] else t - step_after
            )
        dz_chunk = dz[offset : offset + count].view(count * p.batch, p.height, p.width, width)
        _batched_gradients(p, dz_chunk, begin, end, step_flags, h_before, c_before, cells, grads, sums)
        if first_step not in range(begin, end):
            next_begin = end if options.reverse else max(0, begin - length)
            next_edge = 0 if options.reverse else begin - next_begin
            dz[next_edge].copy_(dz[count - 1 + offset if options.reverse else 0])
    if grad_h_0 is not None:
        assert launcher is not None
        frame = first_step - (p.steps - 1) // length * length + 1 if options.reverse else 0
        launcher(True, False, True)(0, first_step, frame, 0, 0, 0)
        assert dh is not None
        grad_h_0.copy_(nchw(dh))
    if grad_c_0 is not None:
        grad_c_0.copy_(nchw(dc))
    for name, grad in (
        ("weight_ih", grad_weight_ih),
        ("weight_hh", grad_weight_hh),
        ("bias", grad_bias),
        ("peephole", grad_peephole),
    ):
        if grad is not None:
            sums[name].write(grad)
    return tuple(grads)


def _batched_gradients(
    p: _Problem,
    dz: Tensor,  # (n * B, H, W, 4 * C), group-major
    begin: int,
    end: int,
    step_flags: Tensor | None,
    h_before: Tensor | None,  # (n, B, H, W, C)
    c_before: Tensor | None,
    cells: Tensor,  # (T, B, H, W, C)
    grads: Sequence[Tensor | None],
    sums: dict[str, Sum],
) -> None:
    """The gradients of the steps [begin, end) of everything that is not the state, through PyTorch."""
    o = p.options
    grad_input, _, _, grad_weight_ih, grad_weight_hh, grad_bias, grad_peephole = grads
    count = end - begin
    grad_z = nchw(dz)
    if grad_input is not None or grad_weight_ih is not None:
        frames, padding = p.padded_input(masked_frames(p.input, step_flags, begin, end))
        d_frames, d_weight = convolution_backward(
            grad_z, frames, p.grouped_weight_ih, o.stride, padding, o.dilation, o.groups,
            grad_input is not None, grad_weight_ih is not None,
        )  # fmt: skip
        if grad_input is not None:
            d_frames = unpad_gradient(d_frames, (p.input.size(3), p.input.size(4)), o.padding, o.padding_mode)
            grad_input[begin:end] = d_frames.unflatten(0, (count, p.batch))
        if grad_weight_ih is not None:
            sums["weight_ih"].add(gate_major(d_weight, p.groups))
    if grad_weight_hh is not None:
        assert h_before is not None
        frames, padding = pad_frames(nchw(h_before.flatten(0, 1)), p.padding, o.padding_mode)
        _, d_weight = convolution_backward(
            grad_z, frames, group_major(p.weight_hh, p.groups), (1, 1), padding, o.recurrent_dilation, o.groups,
            False, True,
        )  # fmt: skip
        sums["weight_hh"].add(gate_major(d_weight, p.groups))
    if grad_bias is not None:
        sums["bias"].add(gate_major(dz.sum((0, 1, 2), dtype=torch.float32), p.groups))
    if grad_peephole is not None:
        assert c_before is not None
        d_i, d_f, _, d_o = gate_major_channels(dz, p.groups)
        axes = (0, 1, 2) if grad_peephole.dim() == 2 else (0,)
        c = cells[begin:end].flatten(0, 1)
        c_before = c_before.flatten(0, 1)
        parts = [(d * state).sum(axes) for d, state in ((d_i, c_before), (d_f, c_before), (d_o, c))]
        sums["peephole"].add(torch.stack([part if part.dim() == 1 else nchw(part) for part in parts]))


def gate_major_channels(dz: Tensor, groups: int) -> tuple[Tensor, ...]:  # (..., 4 * C) -> four times (..., C)
    """The gates of a tensor that is 4 * C wide, group-major."""
    return tuple(gate.flatten(-2) for gate in dz.unflatten(-1, (groups, 4, -1)).unbind(-2))
