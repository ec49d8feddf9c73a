"""Kernels of the pooled-gate ConvLSTM, "variant (a)": a timestep is two launches forward, three backward.

The gates are vectors, one value a channel and sample, from globally pooled frames; a program's rows are therefore
pixels of one image, and what it adds to a pooled sum goes to a slot of its own (no atomics: sums in a fixed order).
Frames are NHWC inside; TILES is the number of row tiles of an image.
"""

# ruff: noqa: SIM108 (branches on compile-time constants)
from __future__ import annotations

import triton
import triton.language as tl

from ._device import gate, gate_slope, neighbour, tanh


@triton.jit
def _pooled(
    partial_ptr, b, k, k_ok, TILES: tl.constexpr, WIDTH: tl.constexpr, TILES_BLOCK: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Sum over the row tiles of a (B, TILES, WIDTH) tensor: (BK,).

    The number of tiles is a constant because Triton 3.6's interpreter cannot loop to a value."""
    total = tl.zeros((BK,), dtype=tl.float32)
    rows = tl.arange(0, TILES_BLOCK)
    for tile in range(0, TILES, TILES_BLOCK):
        offsets = ((b * TILES + tile + rows) * WIDTH)[:, None] + k[None, :]
        ok = (tile + rows < TILES)[:, None] & k_ok[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=ok, other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=["t"])
def pooled_gates_forward_kernel(
    z_ptr,  # (T, B, 3, C) float32: the gates' part of the input, with bias
    partial_ptr,  # (B, tiles, C) float32: sums of the state before the step; HAS_H
    w_ptr,  # (3, C, C): gate_weight_hh
    flags_ptr,  # (T, B) uint8; HAS_FLAGS
    gates_ptr,  # (T or 1, B, 3, C) float32
    t,
    gates_stride_t,
    scale,  # 1 / (H * W)
    B,
    C: tl.constexpr,
    TILES: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """i, f and o of BN channels of one sample: eq. 8 to 12."""
    NB: tl.constexpr = (C + BN - 1) // BN
    pid = tl.program_id(0)
    b = pid // NB
    n = (pid % NB) * BN + tl.arange(0, BN)
    n_ok = n < C
    z = z_ptr + (t.to(tl.int64) * B + b) * (3 * C) + n
    z_i = tl.load(z, mask=n_ok, other=0.0)
    z_f = tl.load(z + C, mask=n_ok, other=0.0)
    z_o = tl.load(z + 2 * C, mask=n_ok, other=0.0)
    if HAS_H:
        for k_0 in range(0, C, BK):
            k = k_0 + tl.arange(0, BK)
            k_ok = k < C
            pooled = _pooled(partial_ptr, b, k, k_ok, TILES, C, TILES_BLOCK, BK) * scale
            if HAS_FLAGS:
                reset = (tl.load(flags_ptr + t.to(tl.int64) * B + b).to(tl.int32) & 1) != 0
                pooled = tl.where(reset, 0.0, pooled)
            w = w_ptr + n[:, None] * C + k[None, :]
            ok = n_ok[:, None] & k_ok[None, :]
            w_i = tl.load(w, mask=ok, other=0.0).to(tl.float32)
            w_f = tl.load(w + C * C, mask=ok, other=0.0).to(tl.float32)
            w_o = tl.load(w + 2 * C * C, mask=ok, other=0.0).to(tl.float32)
            z_i += tl.sum(w_i * pooled[None, :], axis=1)
            z_f += tl.sum(w_f * pooled[None, :], axis=1)
            z_o += tl.sum(w_o * pooled[None, :], axis=1)
    gates = gates_ptr + t.to(tl.int64) * gates_stride_t + b * (3 * C) + n
    tl.store(gates, gate(z_i, ACTIVATION), mask=n_ok)
    tl.store(gates + C, gate(z_f, ACTIVATION), mask=n_ok)
    tl.store(gates + 2 * C, gate(z_o, ACTIVATION), mask=n_ok)


@triton.jit
def _depthwise_tap(
    tap, base, y, x, ok, k, k_ok, w_ptr,
    H, W, stride_y, stride_x, stride_c,
    CHANNELS: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One tap of :func:`_depthwise`."""
    if TRANSPOSED:
        yy = y - (tap // KW) * DIL_H + PAD_H
        xx = x - (tap % KW) * DIL_W + PAD_W
    else:
        yy = y * STRIDE_H + (tap // KW) * DIL_H - PAD_H
        xx = x * STRIDE_W + (tap % KW) * DIL_W - PAD_W
    if PADDING_MODE == 0:
        inside = ok & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
    else:
        inside = ok
        yy = neighbour(yy, H, PADDING_MODE)
        xx = neighbour(xx, W, PADDING_MODE)
    offsets = (yy * stride_y + xx * stride_x)[:, None] + (k * stride_c)[None, :]
    a = tl.load(base + offsets, mask=inside[:, None] & k_ok[None, :], other=0.0).to(tl.float32)
    w = tl.load(w_ptr + tap * CHANNELS + k, mask=k_ok, other=0.0).to(tl.float32)
    return a * w[None, :]


@triton.jit
def _depthwise(
    base, y, x, ok, k, k_ok, w_ptr,
    H, W, stride_y, stride_x, stride_c,
    CHANNELS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution of a tile, (BM, BK) in float32; the weights are (taps, CHANNELS).

    With TRANSPOSED, its transpose, from the positions that read this one (stride 1)."""
    total = tl.zeros((BM, BK), dtype=tl.float32)
    if KH * KW <= 9:  # unrolled, so that all loads are under way at once
        for tap in tl.static_range(KH * KW):
            total += _depthwise_tap(
                tap, base, y, x, ok, k, k_ok, w_ptr, H, W, stride_y, stride_x, stride_c, CHANNELS, KW, STRIDE_H,
                STRIDE_W, DIL_H, DIL_W, PAD_H, PAD_W, PADDING_MODE, TRANSPOSED,
            )  # fmt: skip
    else:
        for tap in range(KH * KW):
            total += _depthwise_tap(
                tap, base, y, x, ok, k, k_ok, w_ptr, H, W, stride_y, stride_x, stride_c, CHANNELS, KW, STRIDE_H,
                STRIDE_W, DIL_H, DIL_W, PAD_H, PAD_W, PADDING_MODE, TRANSPOSED,
            )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["t", "in_t", "h_t", "h_out_t"])
def pooled_gate_forward_kernel(
    x_ptr,  # (n, B, Cin, Hin, Win)
    x_depthwise_ptr,  # (taps, Cin)
    x_pointwise_ptr,  # (NB * BN, XKP)
    h_ptr,  # (..., B, H * W, C): the state before the step; HAS_H
    h_depthwise_ptr,  # (taps, C)
    h_pointwise_ptr,  # (NB * BN, KP)
    bias_ptr,  # (C,); HAS_BIAS
    gates_ptr,  # (T or 1, B, 3, C) float32
    flags_ptr,  # (T, B) uint8; HAS_FLAGS
    c_ptr,  # (B, H * W, C) float32: the cells before the step; HAS_C
    c_out_ptr,  # (B, H * W, C) float32: the cells after it; may be c_ptr
    cells_ptr,  # (T, B, H * W, C): the cells after it, for backward; SAVE_CELLS
    h_out_ptr,  # (..., B, H * W, C)
    out_ptr,  # (T, B, C, H, W): the output, if it is not h_out; OUT
    candidate_ptr,  # (n, B, H * W, C): tanh of the candidate; SAVE_CANDIDATE
    partial_ptr,  # (B, tiles, C) float32: sums of the state after the step
    t,  # timestep: of flags, cells, out, candidate
    in_t,  # frame of x
    h_t,  # frame of h
    h_out_t,  # frame of h_out
    gates_stride_t,  # 0: one frame, in place
    H,
    W,
    tiles,
    x_stride_t,
    x_stride_b,
    x_stride_c,
    x_stride_y,
    x_stride_x,
    Hin,
    Win,
    h_stride_t,
    h_stride_b,
    h_out_stride_t,
    h_out_stride_b,
    out_stride_t,
    out_stride_b,
    out_stride_c,
    out_stride_p,
    B,
    C: tl.constexpr,
    RH: tl.constexpr,  # recurrent kernel
    RW: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    CIN: tl.constexpr,
    XKH: tl.constexpr,  # input kernel
    XKW: tl.constexpr,
    XSTRIDE_H: tl.constexpr,
    XSTRIDE_W: tl.constexpr,
    XDIL_H: tl.constexpr,
    XDIL_W: tl.constexpr,
    XPAD_H: tl.constexpr,
    XPAD_W: tl.constexpr,
    KP: tl.constexpr,
    XKP: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    OUT: tl.constexpr,  # 0: none, 1: channels last, 2: channels first
    SAVE_CELLS: tl.constexpr,
    SAVE_CANDIDATE: tl.constexpr,
    CANDIDATE_ONLY: tl.constexpr,  # recomputation
    ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XBK: tl.constexpr,
):
    """The candidate by depthwise-separable convolutions, the cell update, and the sums of the next step's pooling:
    eq. 13 to 16."""
    NB: tl.constexpr = (C + BN - 1) // BN
    pid = tl.program_id(0)
    n = (pid % NB) * BN + tl.arange(0, BN)
    tile = (pid // NB) % tiles
    b = pid // (NB * tiles)
    pixel = tile * BM + tl.arange(0, BM)
    row_ok = pixel < H * W
    y = pixel // W
    x = pixel % W
    if WIDE:
        b = b.to(tl.int64)
        n = n.to(tl.int64)
        pixel = pixel.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    if HAS_FLAGS:
        flag = tl.load(flags_ptr + t.to(tl.int64) * B + b + pixel * 0).to(tl.int32)  # (BM,), one value
        past_end = ((flag & 2) != 0)[:, None]
        reset = ((flag & 1) != 0)[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    h_base = h_ptr
    if HAS_H:
        h_base = h_ptr + h_t.to(tl.int64) * h_stride_t
        h_base += b * h_stride_b
        h_ok = row_ok
        if HAS_FLAGS:
            h_ok = row_ok & ((flag & 1) == 0)
        for k_0 in range(0, KP, BK):
            k = k_0 + tl.arange(0, BK)
            a = _depthwise(
                h_base, y, x, h_ok, k, k < C, h_depthwise_ptr, H, W, W * C, C, 1,
                C, RH, RW, 1, 1, DIL_H, DIL_W, PAD_H, PAD_W, PADDING_MODE, False, BM, BK,
            )  # fmt: skip
            w = tl.load(h_pointwise_ptr + n[None, :] * KP + k[:, None])
            acc = tl.dot(a.to(dtype), w, acc, input_precision=PRECISION)
    x_base = x_ptr + in_t.to(tl.int64) * x_stride_t + b * x_stride_b
    for k_0 in range(0, XKP, XBK):
        k = k_0 + tl.arange(0, XBK)
        a = _depthwise(
            x_base, y, x, row_ok, k, k < CIN, x_depthwise_ptr, Hin, Win, x_stride_y,
            x_stride_x, x_stride_c, CIN, XKH, XKW, XSTRIDE_H, XSTRIDE_W, XDIL_H, XDIL_W, XPAD_H, XPAD_W, 0, False,
            BM, XBK,
        )  # fmt: skip
        w = tl.load(x_pointwise_ptr + n[None, :] * XKP + k[:, None])
        acc = tl.dot(a.to(dtype), w, acc, input_precision=PRECISION)
    n_ok = n < C
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    g = tanh(acc, ACCURATE)

    mask = row_ok[:, None] & n_ok[None, :]
    frame = b * H * W * C
    local = (pixel * C)[:, None] + n[None, :]
    if SAVE_CANDIDATE:
        candidate = candidate_ptr + t.to(tl.int64) * B * H * W * C + frame + local
        tl.store(candidate, g.to(candidate_ptr.dtype.element_ty), mask=mask)
    if not CANDIDATE_ONLY:
        gates = gates_ptr + t.to(tl.int64) * gates_stride_t + b * (3 * C) + n
        i_gate = tl.load(gates, mask=n_ok, other=0.0)[None, :]
        f_gate = tl.load(gates + C, mask=n_ok, other=0.0)[None, :]
        o_gate = tl.load(gates + 2 * C, mask=n_ok, other=0.0)[None, :]
        c_new = i_gate * g
        c_before = tl.zeros((BM, BN), dtype=tl.float32)
        if HAS_C:
            c_before = tl.load(c_ptr + frame + local, mask=mask, other=0.0)
            if HAS_FLAGS:
                c_new += f_gate * tl.where(reset, 0.0, c_before)
            else:
                c_new += f_gate * c_before
        h = (o_gate * tanh(c_new, ACCURATE)).to(dtype)
        h_state = h
        if HAS_FLAGS:
            c_new = tl.where(past_end, c_before, c_new)
            if HAS_H:
                h_before = tl.load(h_base + local, mask=mask & past_end, other=0.0)
                h_state = tl.where(past_end, h_before, h)
            else:
                h_state = tl.where(past_end, 0.0, h).to(dtype)
            h = tl.where(past_end, 0.0, h).to(dtype)
        tl.store(c_out_ptr + frame + local, c_new, mask=mask)
        if SAVE_CELLS:
            cells = cells_ptr + t.to(tl.int64) * B * H * W * C + frame + local
            tl.store(cells, c_new.to(cells_ptr.dtype.element_ty), mask=mask)
        tl.store(h_out_ptr + h_out_t.to(tl.int64) * h_out_stride_t + b * h_out_stride_b + local, h_state, mask=mask)
        sums = tl.sum(tl.where(mask, h_state.to(tl.float32), 0.0), axis=0)
        tl.store(partial_ptr + (b * tiles + tile) * C + n, sums, mask=n_ok)
        if OUT != 0:
            out = out_ptr + t.to(tl.int64) * out_stride_t + b * out_stride_b
            if OUT == 1:
                tl.store(out + (pixel * out_stride_p)[:, None] + n[None, :], h, mask=mask)
            else:
                # Transposed, so that neighbouring threads write neighbouring pixels.
                out_t = out + (n * out_stride_c)[:, None] + (pixel * out_stride_p)[None, :]
                tl.store(out_t, tl.trans(h), mask=n_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["t", "t_after", "y_t", "dz_out_t", "candidate_t", "c_before_t"])
def pooled_gate_backward_kernel(
    y_ptr,  # (n + 1, B, H * W, C): gradient of the depthwise output of the step after; CONV
    h_depthwise_ptr,  # (taps, C)
    d_pooled_ptr,  # (B, C) float32: gradient of each pixel through the pooled gates of the step after; CONV
    grad_output_ptr,  # (T, B, C, H, W); GRAD_OUTPUT
    carry_ptr,  # (B, H * W, C) float32: gradient of the state that goes past a step unchanged; CARRY
    dc_ptr,  # (B, H * W, C) float32: gradient of the cells, in place
    gates_ptr,  # (T, B, 3, C) float32
    candidate_ptr,  # (n, B, H * W, C)
    c_ptr,  # (T, B, H * W, C): the cells after every step
    c_before_ptr,  # (..., B, H * W, C), of the type of c, or float32; HAS_C
    flags_ptr,  # (T, B) uint8; HAS_FLAGS
    dz_ptr,  # (n, B, H * W, C): gradient of the candidate's pre-activation
    partial_ptr,  # (B, tiles, 3, C) float32: sums for the gradients of i, f, o
    dh_ptr,  # (B, H * W, C): gradient of the state before the step; not CELL
    t,  # timestep whose cell is gone through backward
    t_after,  # the step that follows it, already done
    y_t,  # frame of y
    dz_out_t,
    candidate_t,
    c_before_t,
    H,
    W,
    tiles,
    go_stride_t,
    go_stride_b,
    go_stride_c,
    go_stride_y,
    go_stride_x,
    B,
    C: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr,  # zeros or circular
    CONV: tl.constexpr,
    CELL: tl.constexpr,
    CARRY: tl.constexpr,
    HAS_C: tl.constexpr,
    GRAD_OUTPUT: tl.constexpr,  # 0: none, 1: channels last, 2: channels first
    HAS_FLAGS: tl.constexpr,
    ACCURATE: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The gradient of the state, and the cell's backward: no matrix product, one pass over what it reads."""
    NB: tl.constexpr = (C + BN - 1) // BN
    pid = tl.program_id(0)
    n = (pid % NB) * BN + tl.arange(0, BN)
    tile = (pid // NB) % tiles
    b = pid // (NB * tiles)
    pixel = tile * BM + tl.arange(0, BM)
    row_ok = pixel < H * W
    y = pixel // W
    x = pixel % W
    if WIDE:
        b = b.to(tl.int64)
        n = n.to(tl.int64)
        pixel = pixel.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    n_ok = n < C
    mask = row_ok[:, None] & n_ok[None, :]
    frame = b * H * W * C
    local = (pixel * C)[:, None] + n[None, :]

    dh = tl.zeros((BM, BN), dtype=tl.float32)
    if CONV:
        dh = _depthwise(
            y_ptr + y_t.to(tl.int64) * B * H * W * C + frame, y, x, row_ok, n, n_ok,
            h_depthwise_ptr, H, W, W * C, C, 1, C, RH, RW, 1, 1, DIL_H, DIL_W, PAD_H, PAD_W, PADDING_MODE, True,
            BM, BN,
        )  # fmt: skip
        dh += tl.load(d_pooled_ptr + b * C + n, mask=n_ok, other=0.0)[None, :]
        if HAS_FLAGS:
            after = tl.load(flags_ptr + t_after.to(tl.int64) * B + b + pixel * 0).to(tl.int32)[:, None]
            dh = tl.where(after == 0, dh, 0.0)
    if CARRY:
        carried = tl.load(carry_ptr + frame + local, mask=mask, other=0.0)
        if CONV:
            dh = tl.where((after & 2) != 0, carried, dh)
        else:
            dh = carried
    if not CELL:
        tl.store(dh_ptr + frame + local, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    else:
        if HAS_FLAGS:
            flag = tl.load(flags_ptr + t.to(tl.int64) * B + b + pixel * 0).to(tl.int32)[:, None]  # one value
            past_end = (flag & 2) != 0
            reset = (flag & 1) != 0
            tl.store(carry_ptr + frame + local, dh, mask=mask & past_end)
        if GRAD_OUTPUT != 0:
            go = grad_output_ptr + t.to(tl.int64) * go_stride_t + b * go_stride_b
            go_rows = y * go_stride_y + x * go_stride_x
            if GRAD_OUTPUT == 1:
                dh += tl.load(go + go_rows[:, None] + n[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                go_t = go + (n * go_stride_c)[:, None] + go_rows[None, :]
                dh += tl.trans(tl.load(go_t, mask=n_ok[:, None] & row_ok[None, :], other=0.0)).to(tl.float32)
        gates = gates_ptr + (t.to(tl.int64) * B + b) * (3 * C) + n
        i_gate = tl.load(gates, mask=n_ok, other=0.0)[None, :]
        f_gate = tl.load(gates + C, mask=n_ok, other=0.0)[None, :]
        o_gate = tl.load(gates + 2 * C, mask=n_ok, other=0.0)[None, :]
        g = tl.load(candidate_ptr + candidate_t.to(tl.int64) * B * H * W * C + frame + local, mask=mask, other=0.0).to(
            tl.float32
        )
        c = tl.load(c_ptr + t.to(tl.int64) * B * H * W * C + frame + local, mask=mask, other=0.0).to(tl.float32)
        c_before = tl.zeros((BM, BN), dtype=tl.float32)
        if HAS_C:
            c_before = c_before_ptr + c_before_t.to(tl.int64) * B * H * W * C + frame + local
            c_before = tl.load(c_before, mask=mask, other=0.0).to(tl.float32)
            if HAS_FLAGS:
                c_before = tl.where(reset, 0.0, c_before)
        dc_after = tl.load(dc_ptr + frame + local, mask=mask, other=0.0)
        tanh_c = tanh(c, ACCURATE)
        d_o = dh * tanh_c
        dc = dc_after + dh * o_gate * (1.0 - tanh_c * tanh_c)
        d_i = dc * g
        d_f = dc * c_before
        dz = dc * i_gate * (1.0 - g * g)
        dc = dc * f_gate
        keep = mask
        if HAS_FLAGS:
            # Selected, not multiplied: what stands past the end may be NaN.
            keep = mask & ((flag & 2) == 0)
            dz = tl.where(past_end, 0.0, dz)
            dc = tl.where(reset, 0.0, dc)
            dc = tl.where(past_end, dc_after, dc)
        tl.store(
            dz_ptr + dz_out_t.to(tl.int64) * B * H * W * C + frame + local, dz.to(dz_ptr.dtype.element_ty), mask=mask
        )
        tl.store(dc_ptr + frame + local, dc, mask=mask)
        partial = partial_ptr + (b * tiles + tile) * (3 * C) + n
        tl.store(partial, tl.sum(tl.where(keep, d_i, 0.0), axis=0), mask=n_ok)
        tl.store(partial + C, tl.sum(tl.where(keep, d_f, 0.0), axis=0), mask=n_ok)
        tl.store(partial + 2 * C, tl.sum(tl.where(keep, d_o, 0.0), axis=0), mask=n_ok)


@triton.jit(do_not_specialize=["t"])
def pooled_gates_backward_kernel(
    partial_ptr,  # (B, tiles, 3, C) float32: sums for the gradients of i, f, o
    gates_ptr,  # (T, B, 3, C) float32
    w_ptr,  # (3, C, C): gate_weight_hh
    dz_ptr,  # (T, B, 3, C) float32: gradient of the gates' pre-activations
    d_pooled_ptr,  # (B, C) float32: gradient of each pixel of the state before the step
    t,
    scale,  # 1 / (H * W)
    B,
    C: tl.constexpr,
    TILES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The gates' backward of one sample, and BN channels of the gradient that reaches the pooled state."""
    NB: tl.constexpr = (C + BN - 1) // BN
    pid = tl.program_id(0)
    b = pid // NB
    nb = pid % NB
    n = nb * BN + tl.arange(0, BN)
    n_ok = n < C
    total = tl.zeros((BN,), dtype=tl.float32)
    step = (t.to(tl.int64) * B + b) * (3 * C)
    for k_0 in range(0, 3 * C, BK):
        k = k_0 + tl.arange(0, BK)
        k_ok = k < 3 * C
        value = tl.load(gates_ptr + step + k, mask=k_ok, other=0.0)
        d = _pooled(partial_ptr, b, k, k_ok, TILES, 3 * C, TILES_BLOCK, BK) * gate_slope(value, ACTIVATION)
        # The gates of a step past the end may be NaN; its sums are zero.
        d = tl.where(value == value, d, 0.0)
        tl.store(dz_ptr + step + k, d, mask=k_ok & (k * 0 + nb == 0))
        w = tl.load(w_ptr + k[:, None] * C + n[None, :], mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        total += tl.sum(w.to(tl.float32) * d[:, None], axis=0)
    tl.store(d_pooled_ptr + b * C + n, total * scale, mask=n_ok)
