"""The pooled-gate ConvLSTM, "variant (a)", over a sequence: the steps in Triton, the rest batched over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops._sequence import empty_gradient
from ...ops.layout import empty_frames_like, empty_state_like, frames_are_channels_last
from ..call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions, conv_output_size, same_padding, state_dtype
from ..frames import (
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
from ._conv_lstm2d_kernels import conv_lstm2d_backward_kernel
from ._device import GATE_ACTIVATIONS, PADDING_MODES
from ._pooled_gate_kernels import (
    pooled_gate_backward_kernel,
    pooled_gate_forward_kernel,
    pooled_gates_backward_kernel,
    pooled_gates_forward_kernel,
)
from .launch import StepLauncher, convolution_precision, passes_int32, rounded
from .tile import Tile

GATES_TILE = Tile(bm=1, bn=32, bk=64, num_warps=4, num_stages=2)  # the gate vectors: 32 channels of a sample
TILES_BLOCK = 16  # row tiles whose sums are added at a time


def _pack_depthwise(weight: Tensor) -> Tensor:  # (C, 1, kh, kw) -> (taps, C)
    return weight.flatten(1).t().contiguous()


def _pack_pointwise(weight: Tensor, bn: int, bk: int) -> Tensor:  # (N, K) -> (N, K), padded with zeros to the tile
    rows, columns = -weight.size(0) % bn, -weight.size(1) % bk
    return F.pad(weight, (0, columns, 0, rows)).contiguous()


class _Problem:
    """What forward, recomputation and backward of one call share."""

    def __init__(
        self,
        input: Tensor,
        gate_weight_hh: Tensor,
        depthwise_ih: Tensor,
        depthwise_hh: Tensor,
        pointwise_ih: Tensor,
        pointwise_hh: Tensor,
        bias: Tensor | None,
        options: ConvLSTMOptions,
    ) -> None:
        self.input, self.options = input, options
        self.gate_weight_hh = gate_weight_hh.contiguous()
        self.depthwise_ih, self.depthwise_hh = depthwise_ih, depthwise_hh
        self.pointwise_ih, self.pointwise_hh = pointwise_ih, pointwise_hh
        self.bias = None if bias is None else bias.contiguous()
        self.packed_depthwise_ih, self.packed_depthwise_hh = (
            _pack_depthwise(depthwise_ih),
            _pack_depthwise(depthwise_hh),
        )
        self.steps, self.batch, self.in_channels = input.size(0), input.size(1), input.size(2)
        self.height, self.width = conv_output_size(
            (input.size(3), input.size(4)),
            (depthwise_ih.size(2), depthwise_ih.size(3)),
            options.stride,
            options.padding,
            options.dilation,
        )
        self.channels, self.pixels = pointwise_ih.size(0), self.height * self.width
        self.padding = same_padding((depthwise_hh.size(2), depthwise_hh.size(3)), options.recurrent_dilation)
        self.precision = convolution_precision(input.dtype)

    @property
    def chunk(self) -> int:
        """Steps of a time chunk; backward has some four buffers of C channels."""
        return chunk_steps(self.steps, self.batch * self.pixels * 4 * self.channels * self.input.element_size())

    def order(self) -> range:
        """The steps in the order in which they are computed."""
        return range(self.steps - 1, -1, -1) if self.options.reverse else range(self.steps)

    def frames(self, *shape: int, dtype: torch.dtype) -> Tensor:  # (*shape, B, H, W, C)
        return self.input.new_empty((*shape, self.batch, self.height, self.width, self.channels), dtype=dtype)

    def padded_input(self, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:  # (n, B, Cin, H, W) -> (n * B, ...)
        return pad_frames(frames_nchw(frames), self.options.padding, self.options.padding_mode)

    def forward_tile(self, images: int, run: Callable[[Tile], Callable[[], object]]) -> Tile:
        problem = (self.in_channels, *self.depthwise_ih.shape[2:], *self.depthwise_hh.shape[2:])
        return tuning.choose(
            tuning.POOLED, self.input.device, self.input.dtype, self.precision, images, self.pixels, self.channels, 1,
            problem, run,
        )  # fmt: skip

    def row_tiles(self, tile: Tile) -> int:
        """Row tiles of an image."""
        return -(-self.pixels // tile.bm)

    def gates_step(self, z: Tensor, partial: Tensor, gates: Tensor, flags: Tensor | None, has_h: bool) -> StepLauncher:
        """A launcher of the gates' forward kernel, called with (t)."""
        arguments: dict[str, Any] = {
            "z_ptr": z, "partial_ptr": partial if has_h else None, "w_ptr": self.gate_weight_hh, "flags_ptr": flags,
            "gates_ptr": gates, "gates_stride_t": gates.stride(0) if gates.size(0) > 1 else 0,
            "TILES": partial.size(1), "scale": 1.0 / self.pixels, "B": self.batch, "C": self.channels,
            "HAS_H": has_h, "HAS_FLAGS": flags is not None,
            "ACTIVATION": GATE_ACTIVATIONS.index(self.options.gate_activation), "TILES_BLOCK": TILES_BLOCK,
            "BN": GATES_TILE.bn, "BK": GATES_TILE.bk,
        }  # fmt: skip
        programs = self.batch * -(-self.channels // GATES_TILE.bn)
        return StepLauncher(pooled_gates_forward_kernel, programs, arguments, ("t",), GATES_TILE)

    def forward_step(
        self,
        tile: Tile,
        batch: int,  # images of a launch
        packed: tuple[Tensor, Tensor],  # pointwise weights
        x: Tensor,  # (n, batch, Cin, Hin, Win)
        x_padding: tuple[int, int],
        *,
        h: Tensor | None = None,  # (n, batch, H, W, C)
        c: Tensor | None = None,  # (1, B, H, W, C)
        gates: Tensor | None = None,  # (T or 1, B, 3 * C)
        c_out: Tensor | None = None,  # (1, B, H, W, C)
        cells: Tensor | None = None,  # (T, B, H, W, C)
        h_out: Tensor | None = None,  # (n, B, H, W, C); None: the candidate only
        out: Tensor | None = None,  # (T, B, C, H, W)
        candidate: Tensor | None = None,  # (n, batch, H, W, C)
        partial: Tensor | None = None,  # (B, tiles, C)
        flags: Tensor | None = None,  # (T, B)
    ) -> StepLauncher:
        """A launcher of the step's kernel, called with (t, in_t, h_t, h_out_t)."""
        o = self.options
        kh, kw = self.depthwise_ih.shape[2:]
        rh, rw = self.depthwise_hh.shape[2:]
        depth, x_depth = self.depths(tile)
        h_stride = (0, 0) if h is None else h.stride()
        h_out_stride = (0, 0) if h_out is None else h_out.stride()
        out_stride = (0,) * 5 if out is None else out.stride()
        arguments: dict[str, Any] = {
            "x_ptr": x, "x_depthwise_ptr": self.packed_depthwise_ih, "x_pointwise_ptr": packed[0], "h_ptr": h,
            "h_depthwise_ptr": self.packed_depthwise_hh, "h_pointwise_ptr": packed[1], "bias_ptr": self.bias,
            "gates_ptr": gates, "flags_ptr": flags, "c_ptr": c, "c_out_ptr": c_out, "cells_ptr": cells,
            "h_out_ptr": h_out, "out_ptr": out, "candidate_ptr": candidate, "partial_ptr": partial,
            "gates_stride_t": gates.stride(0) if gates is not None and gates.size(0) > 1 else 0,
            "H": self.height, "W": self.width, "tiles": self.row_tiles(tile), "x_stride_t": x.stride(0),
            "x_stride_b": x.stride(1), "x_stride_c": x.stride(2), "x_stride_y": x.stride(3),
            "x_stride_x": x.stride(4), "Hin": x.size(3), "Win": x.size(4), "h_stride_t": h_stride[0],
            "h_stride_b": h_stride[1], "h_out_stride_t": h_out_stride[0], "h_out_stride_b": h_out_stride[1],
            "out_stride_t": out_stride[0], "out_stride_b": out_stride[1], "out_stride_c": out_stride[2],
            "out_stride_p": out_stride[4], "B": batch, "C": self.channels, "RH": rh, "RW": rw,
            "DIL_H": o.recurrent_dilation[0], "DIL_W": o.recurrent_dilation[1], "PAD_H": self.padding[0],
            "PAD_W": self.padding[2], "PADDING_MODE": PADDING_MODES.index(o.padding_mode), "CIN": self.in_channels,
            "XKH": kh, "XKW": kw, "XSTRIDE_H": o.stride[0], "XSTRIDE_W": o.stride[1], "XDIL_H": o.dilation[0],
            "XDIL_W": o.dilation[1], "XPAD_H": x_padding[0], "XPAD_W": x_padding[1], "KP": packed[1].size(1),
            "XKP": packed[0].size(1), "HAS_H": h is not None, "HAS_C": c is not None,
            "HAS_BIAS": self.bias is not None, "HAS_FLAGS": flags is not None,
            "OUT": 0 if out is None else 1 if out.stride(2) == 1 else 2, "SAVE_CELLS": cells is not None,
            "SAVE_CANDIDATE": candidate is not None, "CANDIDATE_ONLY": h_out is None,
            "ACCURATE": self.input.dtype == torch.float32, "PRECISION": self.precision,
            "WIDE": batch * self.pixels * self.channels >= 2**31 or passes_int32(x, h, h_out, out),
            "BM": tile.bm, "BN": tile.bn, "BK": depth, "XBK": x_depth,
        }  # fmt: skip
        programs = batch * self.row_tiles(tile) * -(-self.channels // tile.bn)
        varying = ("t", "in_t", "h_t", "h_out_t")
        return StepLauncher(pooled_gate_forward_kernel, programs, arguments, varying, tile)

    def depths(self, tile: Tile) -> tuple[int, int]:
        """Depth of a step of the dots with h and with x."""
        size = self.input.element_size()
        return tuning.depth(tile, self.channels, size), tuning.depth(tile, self.in_channels, size)

    def pack(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Pointwise weights of x and of h for a tile."""
        depth, x_depth = self.depths(tile)
        w_x, w_h = rounded(self.pointwise_ih, self.precision), rounded(self.pointwise_hh, self.precision)
        return _pack_pointwise(w_x, tile.bn, x_depth), _pack_pointwise(w_h, tile.bn, depth)

    def candidate_of(self, begin: int, end: int, h_before: Tensor) -> Tensor:  # (end - begin, B, H, W, C)
        """Recomputes the candidate of the steps [begin, end): one launch, every state being known."""
        images = (end - begin) * self.batch
        candidate = self.frames(end - begin, dtype=self.input.dtype)
        frames, padding = self.padded_input(self.input[begin:end])

        def step(tile: Tile) -> StepLauncher:
            return self.forward_step(
                tile, images, self.pack(tile), frames[None], padding, h=h_before.flatten(0, 1)[None],
                candidate=candidate,
            )  # fmt: skip

        def trial(tile: Tile) -> Callable[[], None]:
            launch = step(tile)
            return lambda: launch(0, 0, 0, 0)

        step(self.forward_tile(images, trial))(0, 0, 0, 0)
        return candidate


def forward(
    input: Tensor,  # (T, B, Cin, H, W)
    h_0: Tensor | None,
    c_0: Tensor | None,
    gate_weight_ih: Tensor,
    gate_weight_hh: Tensor,
    gate_bias: Tensor | None,
    depthwise_ih: Tensor,
    depthwise_hh: Tensor,
    pointwise_ih: Tensor,
    pointwise_hh: Tensor,
    bias: Tensor | None,
    step_flags: Tensor | None,
    options: ConvLSTMOptions,
    save: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :meth:`fused_convlstm.backends.base.Backend.pooled_gate_conv_lstm2d`."""
    p = _Problem(input, gate_weight_hh, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias, options)
    dtype, c_type = input.dtype, state_dtype(input.dtype)
    keeps = save != SAVE_NOTHING
    output = empty_frames_like(input, p.channels, p.height, p.width)
    h_n = empty_state_like(input, p.channels, p.height, p.width, dtype)
    c_n = empty_state_like(input, p.channels, p.height, p.width, c_type)
    gates = input.new_empty((p.steps if keeps else 1, p.batch, 3 * p.channels), dtype=c_type)
    candidate = p.frames(p.steps, dtype=dtype) if save == SAVE_GATES else input.new_empty((0,))
    cells = p.frames(p.steps, dtype=dtype) if keeps else input.new_empty((0,))
    saved = (gates if keeps else gates.new_empty((0,)), candidate, cells)
    if p.batch == 0:
        return output, h_n, c_n, *saved
    # The output is the state of the next step if its channels lie together and no step hides the state.
    direct = frames_are_channels_last(input) and step_flags is None
    states = nhwc(output) if direct else p.frames(2, dtype=dtype)
    c_state = p.frames(1, dtype=c_type)  # in place
    h_first, c_first = frames_of(h_0, dtype), frames_of(c_0, c_type)
    pooled = input.mean((3, 4), dtype=torch.float32)  # (T, B, Cin)
    z = F.linear(pooled, gate_weight_ih.float(), None if gate_bias is None else gate_bias.float())

    def prepare(tile: Tile, x: Tensor, x_padding: tuple[int, int], partial: Tensor) -> Callable[[bool], StepLauncher]:
        """The launcher of the first step (True), or of the others (False)."""
        packed = p.pack(tile)

        def launcher(first: bool) -> StepLauncher:
            h, c = (h_first, c_first) if first else (states, c_state)
            return p.forward_step(
                tile, p.batch, packed, x, x_padding, h=h, c=c, gates=gates, c_out=c_state,
                cells=cells if keeps else None, h_out=states, out=None if direct else output,
                candidate=candidate if save == SAVE_GATES else None, partial=partial, flags=step_flags,
            )  # fmt: skip

        return launcher

    def new_partial(tile: Tile) -> Tensor:  # (B, tiles, C)
        return input.new_empty((p.batch, p.row_tiles(tile), p.channels), dtype=torch.float32)

    launchers: list[StepLauncher] = []
    before = 0  # the step computed last
    position = 0  # of the step in the order of computation
    for begin, end, x, x_padding in input_frames(input, options, p.chunk):
        if not launchers:

            def trial(tile: Tile, x: Tensor = x, x_padding: tuple[int, int] = x_padding) -> Callable[[], None]:
                launch = prepare(tile, x, x_padding, new_partial(tile))(p.steps == 1)
                return lambda: launch(0, 0, 0, 0)

            tile = p.forward_tile(p.batch, trial)
            partial = new_partial(tile)
            launcher = prepare(tile, x, x_padding, partial)
            if h_0 is not None:
                partial.zero_()
                partial[:, 0] = h_0.sum((2, 3), dtype=torch.float32)
            launchers = [launcher(True), launcher(False)] if p.steps > 1 else [launcher(True)]
            gate_launchers = [p.gates_step(z, partial, gates, step_flags, has_h) for has_h in (h_0 is not None, True)]
        else:
            for launch in launchers:
                launch.bind("x_ptr", x)
        for t in reversed(range(begin, end)) if options.reverse else range(begin, end):
            h_out = t if direct else position % 2
            later = min(position, 1)
            h = 0 if position == 0 else before if direct else (position - 1) % 2
            gate_launchers[later](t)
            launchers[later](t, t - begin, h, h_out)
            before = t
            position += 1
    h_n.copy_(nchw(states[before if direct else (position - 1) % 2]))
    c_n.copy_(nchw(c_state[0]))
    return output, h_n, c_n, *saved


def backward(
    grad_output: Tensor | None,  # (T, B, C, Ho, Wo)
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    gate_weight_ih: Tensor,
    gate_weight_hh: Tensor,
    gate_bias: Tensor | None,
    depthwise_ih: Tensor,
    depthwise_hh: Tensor,
    pointwise_ih: Tensor,
    pointwise_hh: Tensor,
    bias: Tensor | None,
    step_flags: Tensor | None,
    output: Tensor,
    gates: Tensor,
    candidate: Tensor,
    cells: Tensor,
    options: ConvLSTMOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """See :meth:`fused_convlstm.backends.base.Backend.pooled_gate_conv_lstm2d_backward`."""
    arguments = (
        input, h_0, c_0, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih,
        pointwise_hh, bias,
    )  # fmt: skip
    names = (
        "input", "h_0", "c_0", "gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh",
        "pointwise_ih", "pointwise_hh", "bias",
    )  # fmt: skip
    grads = {
        name: empty_gradient(k, tensor, input) if need and tensor is not None else None
        for k, (name, tensor, need) in enumerate(zip(names, arguments, needs, strict=True))
    }
    p = _Problem(input, gate_weight_hh, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias, options)
    if p.batch == 0:
        return tuple(None if grad is None else grad.zero_() for grad in grads.values())
    dtype, c_type = input.dtype, state_dtype(input.dtype)
    recompute = candidate.numel() == 0
    h_states = nhwc(output)
    h_first, c_first = frames_of(h_0, dtype), frames_of(c_0, c_type)

    length = p.chunk
    dz = p.frames(length, dtype=dtype)
    y = p.frames(length + 1, dtype=dtype)  # of a chunk, and of the step computed before it
    d_gates = torch.empty_like(gates)
    d_pooled = gates.new_empty((p.batch, p.channels))
    dc = p.frames(dtype=c_type)
    dc.zero_() if grad_c_n is None else dc.copy_(nhwc(grad_c_n))
    carry = None
    if grad_h_n is not None or step_flags is not None:
        carry = p.frames(dtype=torch.float32)
        carry.zero_() if grad_h_n is None else carry.copy_(nhwc(grad_h_n))
    dh = p.frames(dtype=dtype) if grads["h_0"] is not None else None
    cell_tile = _cell_tile(p)
    tiles = -(-p.pixels // cell_tile.bm)
    partial = gates.new_empty((p.batch, tiles, 3 * p.channels))
    rh, rw = depthwise_hh.shape[2:]

    def cell_step(conv: bool, cell: bool, initial: bool) -> StepLauncher:
        """Called with (t, t_after, y_t, dz_out_t, candidate_t, c_before_t)."""
        go = grad_output if cell else None
        go_stride = (0,) * 5 if go is None else go.stride()
        c_before = c_first if initial else cells
        use_carry = step_flags is not None or (not conv and carry is not None)
        step_arguments: dict[str, Any] = {
            "y_ptr": y, "h_depthwise_ptr": p.packed_depthwise_hh, "d_pooled_ptr": d_pooled, "grad_output_ptr": go,
            "carry_ptr": carry if use_carry else None, "dc_ptr": dc, "gates_ptr": gates,
            "candidate_ptr": candidate, "c_ptr": cells, "c_before_ptr": c_before, "flags_ptr": step_flags,
            "dz_ptr": dz, "partial_ptr": partial, "dh_ptr": None if cell else dh, "H": p.height, "W": p.width,
            "tiles": tiles, "go_stride_t": go_stride[0], "go_stride_b": go_stride[1], "go_stride_c": go_stride[2],
            "go_stride_y": go_stride[3], "go_stride_x": go_stride[4], "B": p.batch, "C": p.channels, "RH": rh,
            "RW": rw, "DIL_H": options.recurrent_dilation[0], "DIL_W": options.recurrent_dilation[1],
            "PAD_H": p.padding[0], "PAD_W": p.padding[2],
            "PADDING_MODE": PADDING_MODES.index(options.padding_mode), "CONV": conv, "CELL": cell,
            "CARRY": use_carry, "HAS_C": c_before is not None,
            "GRAD_OUTPUT": 0 if go is None else 1 if go_stride[2] == 1 else 2, "HAS_FLAGS": step_flags is not None,
            "ACCURATE": dtype == torch.float32,
            "WIDE": p.batch * p.pixels * p.channels >= 2**31 or passes_int32(grad_output),
            "BM": cell_tile.bm, "BN": cell_tile.bn,
        }  # fmt: skip
        programs = p.batch * tiles * -(-p.channels // cell_tile.bn)
        varying = ("t", "t_after", "y_t", "dz_out_t", "candidate_t", "c_before_t")
        return StepLauncher(pooled_gate_backward_kernel, programs, step_arguments, varying, cell_tile)

    gates_step = _gates_backward_step(p, partial, gates, d_gates, d_pooled)
    product = _product_step(p, dz, y)

    sums = {name: Sum() for name in names[3:]}
    order = p.order()
    first_step, last_step = order[0], order[-1]
    launchers: dict[tuple[bool, bool], StepLauncher] = {}
    step_after = 1 if not options.reverse else -1  # t + step_after comes after t
    for begin, end in chunks(p.steps, length, backward=not options.reverse):
        count = end - begin
        # Step t of the chunk lies in frame t - begin + offset of y, next to it the step that was computed before.
        offset = 1 if options.reverse else 0
        h_before = None
        if recompute or any(grads[name] is not None for name in ("gate_weight_hh", "depthwise_hh", "pointwise_hh")):
            h_before = previous_frames(h_states, h_first, step_flags, begin, end, options.reverse)
        if recompute:
            assert h_before is not None
            candidate = p.candidate_of(begin, end, h_before)
            for launch in launchers.values():
                launch.bind("candidate_ptr", candidate)
        candidate_begin = begin if recompute else 0
        for t in range(begin, end) if options.reverse else reversed(range(begin, end)):
            key = (t != last_step, t == first_step)
            if key not in launchers:
                launchers[key] = cell_step(key[0], True, key[1])
            after = t + step_after
            before = 0 if key[1] else t - step_after
            launchers[key](t, after, after - begin + offset, t - begin, t - candidate_begin, before)
            gates_step(t)
            product(0, 0, t - begin, t - begin + offset, 0, 0)
        _batched_gradients(
            p, gate_weight_ih, dz[:count], y[offset : offset + count], d_gates, begin, end, step_flags, h_before,
            grads, sums,
        )  # fmt: skip
        if first_step not in range(begin, end):
            next_begin = end if options.reverse else max(0, begin - length)
            next_edge = 0 if options.reverse else begin - next_begin
            y[next_edge].copy_(y[count - 1 + offset if options.reverse else 0])
    if grads["h_0"] is not None:
        assert dh is not None
        frame = first_step - (p.steps - 1) // length * length + 1 if options.reverse else 0
        cell_step(True, False, True)(0, first_step, frame, 0, 0, 0)
        grads["h_0"].copy_(nchw(dh))
    if grads["c_0"] is not None:
        grads["c_0"].copy_(nchw(dc))
    for name, total in sums.items():
        grad = grads[name]
        if grad is not None:
            total.write(grad)
    return tuple(grads.values())


def _cell_tile(p: _Problem) -> Tile:
    """The tile of the kernel without a matrix product: enough programs, whole lines of memory."""
    bn = 16
    while bn < min(p.channels, 64):
        bn *= 2
    return Tile(bm=16 if p.pixels <= 64 else 32, bn=bn, bk=0, num_warps=4, num_stages=1)


def _gates_backward_step(
    p: _Problem, partial: Tensor, gates: Tensor, d_gates: Tensor, d_pooled: Tensor
) -> StepLauncher:
    """A launcher of the gates' backward kernel, called with (t)."""
    arguments: dict[str, Any] = {
        "partial_ptr": partial, "gates_ptr": gates, "w_ptr": p.gate_weight_hh, "dz_ptr": d_gates,
        "d_pooled_ptr": d_pooled, "TILES": partial.size(1), "scale": 1.0 / p.pixels, "B": p.batch, "C": p.channels,
        "ACTIVATION": GATE_ACTIVATIONS.index(p.options.gate_activation), "TILES_BLOCK": TILES_BLOCK,
        "BN": GATES_TILE.bn, "BK": GATES_TILE.bk,
    }  # fmt: skip
    programs = p.batch * -(-p.channels // GATES_TILE.bn)
    return StepLauncher(pooled_gates_backward_kernel, programs, arguments, ("t",), GATES_TILE)


def _product_step(p: _Problem, dz: Tensor, y: Tensor) -> StepLauncher:
    """A launcher of y = dz @ pointwise_hh, called with (0, 0, frame of dz, frame of y, 0, 0): the ConvLSTM's backward
    kernel with a 1 x 1 convolution and no cell."""
    rows = p.batch * p.pixels

    def step(tile: Tile) -> StepLauncher:
        depth = tuning.depth(tile, p.channels, dz.element_size())
        packed = _pack_pointwise(rounded(p.pointwise_hh, p.precision).t(), tile.bn, depth)
        absent = (
            "grad_output_ptr", "carry_ptr", "dc_ptr", "gates_ptr", "c_ptr", "c_before_ptr", "peephole_ptr",
            "flags_ptr",
        )  # fmt: skip
        arguments: dict[str, Any] = dict.fromkeys(absent) | {
            "dz_ptr": dz, "w_ptr": packed, "dh_ptr": y, "M": rows, "H": p.height, "W": p.width, "go_stride_t": 0,
            "go_stride_b": 0, "go_stride_c": 0, "go_stride_y": 0, "go_stride_x": 0, "B": p.batch, "CG": p.channels,
            "G": 1, "K": p.channels, "RH": 1, "RW": 1, "DIL_H": 1, "DIL_W": 1, "PAD_H": 0, "PAD_W": 0,
            "PADDING_MODE": 0, "KP": packed.size(1), "CONV": True, "CELL": False, "CARRY": False, "HAS_C": False,
            "GRAD_OUTPUT": 0, "PEEPHOLE": 0, "HAS_FLAGS": False, "ACTIVATION": 0, "ACCURATE": False,
            "PRECISION": p.precision, "WIDE": rows * p.channels >= 2**31, "SLICES": 1, "BM": tile.bm, "BN": tile.bn,
            "BK": depth,
        }  # fmt: skip
        programs = -(-rows // tile.bm) * -(-p.channels // tile.bn)
        varying = ("t", "t_after", "dz_t", "dz_out_t", "gates_t", "c_before_t")
        return StepLauncher(conv_lstm2d_backward_kernel, programs, arguments, varying, tile)

    def trial(tile: Tile) -> Callable[[], None]:
        launch = step(tile)
        return lambda: launch(0, 0, 0, 0, 0, 0)

    tile = tuning.choose(
        tuning.BACKWARD, dz.device, dz.dtype, p.precision, 1, rows, p.channels, 1, (p.channels, 1, 1), trial
    )
    return step(tile)


def _batched_gradients(
    p: _Problem,
    gate_weight_ih: Tensor,
    dz: Tensor,  # (n, B, H, W, C): gradient of the candidate's pre-activation
    y: Tensor,  # (n, B, H, W, C): gradient of the depthwise convolution of the state
    d_gates: Tensor,  # (T, B, 3 * C) float32
    begin: int,
    end: int,
    step_flags: Tensor | None,
    h_before: Tensor | None,  # (n, B, H, W, C)
    grads: dict[str, Tensor | None],
    sums: dict[str, Sum],
) -> None:
    """The gradients of the steps [begin, end) of everything that is not the state, through PyTorch."""
    o = p.options
    frames_of_chunk = (end - begin) * p.batch
    d_gates = d_gates[begin:end].flatten(0, 1)  # (n * B, 3 * C)
    dz_rows = dz.view(-1, p.channels)  # (n * B * H * W, C)
    if grads["gate_bias"] is not None:
        sums["gate_bias"].add(d_gates.sum(0))
    if grads["bias"] is not None:
        sums["bias"].add(dz_rows.sum(0, dtype=torch.float32))

    if any(grads[name] is not None for name in ("input", "gate_weight_ih", "depthwise_ih", "pointwise_ih")):
        x = frames_nchw(masked_frames(p.input, step_flags, begin, end))  # (n * B, Cin, H, W)
        frames, padding = pad_frames(x, o.padding, o.padding_mode)
        if grads["gate_weight_ih"] is not None:
            sums["gate_weight_ih"].add(d_gates.t() @ x.mean((2, 3), dtype=torch.float32))
        if grads["pointwise_ih"] is not None:
            depthwise = F.conv2d(frames, p.depthwise_ih, None, o.stride, padding, o.dilation, p.in_channels)
            sums["pointwise_ih"].add(dz_rows.t() @ nhwc(depthwise).reshape(-1, p.in_channels))
        if grads["input"] is not None or grads["depthwise_ih"] is not None:
            d_depthwise = (dz_rows @ p.pointwise_ih).view(frames_of_chunk, p.height, p.width, p.in_channels)
            d_frames, d_weight = convolution_backward(
                nchw(d_depthwise), frames, p.depthwise_ih, o.stride, padding, o.dilation, p.in_channels,
                grads["input"] is not None, grads["depthwise_ih"] is not None,
            )  # fmt: skip
            if grads["depthwise_ih"] is not None:
                sums["depthwise_ih"].add(d_weight)
            if grads["input"] is not None:
                size = (p.input.size(3), p.input.size(4))
                d_frames = unpad_gradient(d_frames, size, o.padding, o.padding_mode)
                d_mean = d_gates @ gate_weight_ih.float() / (size[0] * size[1])  # (n * B, Cin)
                d_frames = d_frames + d_mean[:, :, None, None].to(d_frames.dtype)
                grads["input"][begin:end] = d_frames.unflatten(0, (end - begin, p.batch))

    if h_before is not None:
        h = nchw(h_before.flatten(0, 1))  # (n * B, C, H, W)
        frames, padding = pad_frames(h, p.padding, o.padding_mode)
        if grads["gate_weight_hh"] is not None:
            sums["gate_weight_hh"].add(d_gates.t() @ h.mean((2, 3), dtype=torch.float32))
        if grads["pointwise_hh"] is not None:
            depthwise = F.conv2d(frames, p.depthwise_hh, None, 1, padding, o.recurrent_dilation, p.channels)
            sums["pointwise_hh"].add(dz_rows.t() @ nhwc(depthwise).reshape(-1, p.channels))
        if grads["depthwise_hh"] is not None:
            _, d_weight = convolution_backward(
                nchw(y.flatten(0, 1)), frames, p.depthwise_hh, (1, 1), padding, o.recurrent_dilation, p.channels,
                False, True,
            )  # fmt: skip
            sums["depthwise_hh"].add(d_weight)
