"""Kernels of the ConvLSTM: one timestep forward, one timestep backward.

Inside, frames are NHWC and flattened to rows: m = (b * H + y) * W + x. Channels are split into G groups of Cg; what is
4 * C wide is (G, 4, Cg), which for one group is the gate-major order of the weights.
"""

# ruff: noqa: SIM108 (branches on compile-time constants)
from __future__ import annotations

import triton
import triton.language as tl

from ._device import gate, gate_slope, gate_to_store, halves, neighbour, split_gates, tanh


@triton.jit
def _gate_columns(ptr, rows, n, CG: tl.constexpr, GROUP_OFFSET, mask):
    """Four (BM, BN) tiles of a (rows, G, 4, Cg) tensor, in float32."""
    p = ptr + rows[:, None] + (GROUP_OFFSET + n)[None, :]
    i = tl.load(p, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(p + CG, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(p + 2 * CG, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(p + 3 * CG, mask=mask, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit
def _forward_cell(
    z_i, z_f, z_g, z_o,  # (BM, BN): the convolution of the state, and that of x if it is fused
    n,  # (BN,): channel within the group
    m, b, pixel, row_ok, keeps, past_end, group, t, in_t, h_t, h_out_t,
    z_ptr, h_ptr, bias_ptr, peephole_ptr, c_ptr, c_out_ptr, cells_ptr, h_out_ptr, out_ptr, gates_ptr,
    M, H, W, h_stride_t, h_stride_b, h_out_stride_t, h_out_stride_b, out_stride_t, out_stride_b,
    out_stride_c, out_stride_p, CG: tl.constexpr, G: tl.constexpr, HAS_Z: tl.constexpr, HAS_H: tl.constexpr,
    HAS_C: tl.constexpr, HAS_BIAS: tl.constexpr, PEEPHOLE: tl.constexpr, HAS_FLAGS: tl.constexpr,
    OUT: tl.constexpr, SAVE_CELLS: tl.constexpr, SAVE_GATES: tl.constexpr, GATES_ONLY: tl.constexpr,
    ACTIVATION: tl.constexpr, ACCURATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of the forward step: pre-activations to gates, cell and state."""
    C: tl.constexpr = G * CG
    n_ok = n < CG
    column = group * CG + n
    mask = row_ok[:, None] & n_ok[None, :]
    if HAS_Z:
        zx_i, zx_f, zx_g, zx_o = _gate_columns(
            z_ptr + in_t.to(tl.int64) * M * (4 * C), m * (4 * C), n, CG, group * (4 * CG), mask
        )
        z_i += zx_i
        z_f += zx_f
        z_g += zx_g
        z_o += zx_o
    if HAS_BIAS:
        z_i += tl.load(bias_ptr + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        z_f += tl.load(bias_ptr + C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        z_g += tl.load(bias_ptr + 2 * C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        z_o += tl.load(bias_ptr + 3 * C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]

    state = m[:, None] * C + column[None, :]
    if HAS_C:
        c_before = tl.load(c_ptr + state, mask=mask, other=0.0).to(tl.float32)
        if HAS_FLAGS:
            c = tl.where(keeps[:, None], c_before, 0.0)
        else:
            c = c_before
    else:
        c_before = tl.zeros((BM, BN), dtype=tl.float32)
        c = c_before
    if PEEPHOLE == 1:
        w_ci = tl.load(peephole_ptr + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        w_cf = tl.load(peephole_ptr + C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        w_co = tl.load(peephole_ptr + 2 * C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if PEEPHOLE == 2:
        w_pixel = peephole_ptr + pixel[:, None] * C + column[None, :]
        w_ci = tl.load(w_pixel, mask=mask, other=0.0).to(tl.float32)
        w_cf = tl.load(w_pixel + H * W * C, mask=mask, other=0.0).to(tl.float32)
        w_co = tl.load(w_pixel + 2 * H * W * C, mask=mask, other=0.0).to(tl.float32)
    if PEEPHOLE != 0:
        z_i += w_ci * c
        z_f += w_cf * c
    i_gate = gate(z_i, ACTIVATION)
    f_gate = gate(z_f, ACTIVATION)
    g_gate = tanh(z_g, ACCURATE)
    if GATES_ONLY:
        if PEEPHOLE != 0:
            c_new = tl.load(cells_ptr + state, mask=mask, other=0.0).to(tl.float32)
    else:
        c_new = f_gate * c + i_gate * g_gate
    if PEEPHOLE != 0:
        z_o += w_co * c_new
    o_gate = gate(z_o, ACTIVATION)

    if SAVE_GATES:
        dtype: tl.constexpr = gates_ptr.dtype.element_ty
        g_out = gates_ptr + t.to(tl.int64) * M * (4 * C) + (m * (4 * C))[:, None] + (group * (4 * CG) + n)[None, :]
        tl.store(g_out, gate_to_store(i_gate, ACTIVATION, dtype), mask=mask)
        tl.store(g_out + CG, gate_to_store(f_gate, ACTIVATION, dtype), mask=mask)
        tl.store(g_out + 2 * CG, g_gate.to(dtype), mask=mask)
        tl.store(g_out + 3 * CG, gate_to_store(o_gate, ACTIVATION, dtype), mask=mask)
    if not GATES_ONLY:
        h_type: tl.constexpr = h_out_ptr.dtype.element_ty
        h = (o_gate * tanh(c_new, ACCURATE)).to(h_type)
        h_state = h
        if HAS_FLAGS:
            kept = past_end[:, None]
            c_new = tl.where(kept, c_before, c_new)
            if HAS_H:
                center = h_ptr + h_t.to(tl.int64) * h_stride_t
                center += (b * h_stride_b + pixel * C)[:, None] + column[None, :]
                h_before = tl.load(center, mask=mask & kept, other=0.0)
                h_state = tl.where(kept, h_before, h)
            else:
                h_state = tl.where(kept, 0.0, h)
            h = tl.where(kept, 0.0, h)
        tl.store(c_out_ptr + state, c_new, mask=mask)
        if SAVE_CELLS:
            cells = cells_ptr + t.to(tl.int64) * M * C + state
            tl.store(cells, c_new.to(cells_ptr.dtype.element_ty), mask=mask)
        h_out = h_out_ptr + h_out_t.to(tl.int64) * h_out_stride_t
        tl.store(h_out + (b * h_out_stride_b + pixel * C)[:, None] + column[None, :], h_state.to(h_type), mask=mask)
        if OUT != 0:
            out = out_ptr + t.to(tl.int64) * out_stride_t
            out_rows = b * out_stride_b + pixel * out_stride_p
            if OUT == 1:
                tl.store(out + out_rows[:, None] + column[None, :], h.to(h_type), mask=mask)
            else:
                # Transposed, so that neighbouring threads write neighbouring pixels.
                out_t = out + (column * out_stride_c)[:, None] + out_rows[None, :]
                tl.store(out_t, tl.trans(h.to(h_type)), mask=n_ok[:, None] & row_ok[None, :])


@triton.jit(do_not_specialize=["t", "in_t", "h_t", "h_out_t"])
def conv_lstm2d_forward_kernel(
    z_ptr,  # (n, M, G, 4, Cg): the input part; HAS_Z
    x_ptr,  # (n, B, Cin, Hin, Win): the frames; HAS_X
    wx_ptr,  # X_FLAT: (G, NB, 4 * BN, XKP), k = (tap, channel); else (taps, G, NB, 4 * BN, XKP)
    h_ptr,  # (..., B, H * W, C): the state before the step; HAS_H
    wh_ptr,  # (taps, G, NB, 4 * BN, KP)
    bias_ptr,  # (4, C); HAS_BIAS
    peephole_ptr,  # (3, C), or (3, H * W, C); PEEPHOLE 1 or 2
    flags_ptr,  # (T, B) uint8; HAS_FLAGS
    c_ptr,  # (M, C): the cells before the step; HAS_C
    c_out_ptr,  # (M, C) float32: the cells after it; may be c_ptr
    cells_ptr,  # (T, M, C): the cells after it, for backward; SAVE_CELLS, read if GATES_ONLY
    h_out_ptr,  # (..., B, H * W, C): the state after it
    out_ptr,  # (T, B, C, H, W): the output, if it is not h_out; OUT
    gates_ptr,  # (n, M, G, 4, Cg): the gates; SAVE_GATES
    t,  # timestep: of flags, cells, out, gates
    in_t,  # frame of z or x
    h_t,  # frame of h
    h_out_t,  # frame of h_out
    M,  # B * H * W
    H,
    W,
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
    CG: tl.constexpr,  # hidden channels of a group
    G: tl.constexpr,
    RH: tl.constexpr,  # recurrent kernel
    RW: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PAD_H: tl.constexpr,  # top, left
    PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    XCG: tl.constexpr,  # input channels of a group
    XKH: tl.constexpr,  # input kernel
    XKW: tl.constexpr,
    XSTRIDE_H: tl.constexpr,
    XSTRIDE_W: tl.constexpr,
    XDIL_H: tl.constexpr,
    XDIL_W: tl.constexpr,
    XPAD_H: tl.constexpr,
    XPAD_W: tl.constexpr,
    KP: tl.constexpr,  # Cg, padded
    XKP: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_X: tl.constexpr,
    X_FLAT: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PEEPHOLE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    OUT: tl.constexpr,  # 0: none, 1: channels last, 2: channels first
    SAVE_CELLS: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    GATES_ONLY: tl.constexpr,  # recomputation: the cells are given
    ACTIVATION: tl.constexpr,
    ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,  # offsets within a frame pass 2^31
    SLICES: tl.constexpr,  # parts in which the epilogue goes through a tile: 1 or 2; backward also 4
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    XBK: tl.constexpr,
):
    C: tl.constexpr = G * CG
    NB: tl.constexpr = (CG + BN - 1) // BN
    pid = tl.program_id(0)
    nb = pid % NB
    group = (pid // NB) % G
    m = (pid // (NB * G)) * BM + tl.arange(0, BM)
    row_ok = m < M
    b = m // (H * W)
    pixel = m % (H * W)
    y = pixel // W
    x = pixel % W
    n_0 = nb * BN
    if WIDE:
        m = m.to(tl.int64)
        b = b.to(tl.int64)
        pixel = pixel.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        n_0 = n_0.to(tl.int64)
    if HAS_FLAGS:
        flag = tl.load(flags_ptr + t.to(tl.int64) * B + b, mask=row_ok, other=0).to(tl.int32)
        past_end = (flag & 2) != 0
        keeps = row_ok & ((flag & 1) == 0)  # whose state is read
    else:
        past_end = row_ok
        keeps = row_ok
    columns = tl.arange(0, 4 * BN)
    acc = tl.zeros((BM, 4 * BN), dtype=tl.float32)

    if HAS_H:
        KB: tl.constexpr = KP // BK
        h_base = h_ptr + h_t.to(tl.int64) * h_stride_t + group * CG
        h_rows = b * h_stride_b
        k = tl.arange(0, BK)
        w_tile = wh_ptr + (group * NB + nb) * (4 * BN * KP) + columns[None, :] * KP + k[:, None]
        for i in range(RH * RW * KB):
            tap = i // KB
            k_0 = (i % KB) * BK
            yy = y + (tap // RW) * DIL_H - PAD_H
            xx = x + (tap % RW) * DIL_W - PAD_W
            if PADDING_MODE == 0:
                ok = keeps & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
            else:
                ok = keeps
                yy = neighbour(yy, H, PADDING_MODE)
                xx = neighbour(xx, W, PADDING_MODE)
            rows = h_rows + (yy * W + xx) * C + k_0
            if CG % BK == 0:
                a_mask = ok[:, None]
            else:
                a_mask = ok[:, None] & (k < CG - k_0)[None, :]
            a = tl.load(h_base + rows[:, None] + k[None, :], mask=a_mask, other=0.0)
            w = tl.load(w_tile + (tap * (G * NB * 4 * BN * KP) + k_0))
            acc = tl.dot(a, w, acc, input_precision=PRECISION)

    if HAS_X:
        XKB: tl.constexpr = XKP // XBK
        x_base = x_ptr + in_t.to(tl.int64) * x_stride_t + group * XCG * x_stride_c
        x_rows = b * x_stride_b
        xk = tl.arange(0, XBK)
        if WIDE:
            xk = xk.to(tl.int64)
        xw_tile = wx_ptr + (group * NB + nb) * (4 * BN * XKP) + columns[None, :] * XKP + xk[:, None]
        if X_FLAT:
            for i in range(XKB):
                kk = i * XBK + xk
                tap = kk // XCG
                yy = y[:, None] * XSTRIDE_H + ((tap // XKW) * XDIL_H - XPAD_H)[None, :]
                xx = x[:, None] * XSTRIDE_W + ((tap % XKW) * XDIL_W - XPAD_W)[None, :]
                ok = row_ok[:, None] & (kk < XCG * XKH * XKW)[None, :]
                ok = ok & (yy >= 0) & (yy < Hin) & (xx >= 0) & (xx < Win)
                offsets = x_rows[:, None] + yy * x_stride_y + xx * x_stride_x + ((kk % XCG) * x_stride_c)[None, :]
                a = tl.load(x_base + offsets, mask=ok, other=0.0)
                w = tl.load(xw_tile + i * XBK)
                acc = tl.dot(a, w, acc, input_precision=PRECISION)
        else:
            for i in range(XKH * XKW * XKB):
                tap = i // XKB
                k_0 = (i % XKB) * XBK
                yy = y * XSTRIDE_H + (tap // XKW) * XDIL_H - XPAD_H
                xx = x * XSTRIDE_W + (tap % XKW) * XDIL_W - XPAD_W
                ok = row_ok & (yy >= 0) & (yy < Hin) & (xx >= 0) & (xx < Win)
                rows = x_rows + yy * x_stride_y + xx * x_stride_x + k_0 * x_stride_c
                if XCG % XBK == 0:
                    a_mask = ok[:, None]
                else:
                    a_mask = ok[:, None] & (xk < XCG - k_0)[None, :]
                a = tl.load(x_base + rows[:, None] + (xk * x_stride_c)[None, :], mask=a_mask, other=0.0)
                w = tl.load(xw_tile + (tap * (G * NB * 4 * BN * XKP) + k_0))
                acc = tl.dot(a, w, acc, input_precision=PRECISION)

    z_i, z_f, z_g, z_o = split_gates(acc, BM, BN)
    if SLICES == 1:
        _forward_cell(
            z_i, z_f, z_g, z_o, n_0 + tl.arange(0, BN),
            m, b, pixel, row_ok, keeps, past_end, group, t, in_t, h_t, h_out_t,
            z_ptr, h_ptr, bias_ptr, peephole_ptr, c_ptr, c_out_ptr, cells_ptr, h_out_ptr, out_ptr, gates_ptr,
            M, H, W, h_stride_t, h_stride_b, h_out_stride_t, h_out_stride_b, out_stride_t, out_stride_b,
            out_stride_c, out_stride_p, CG, G, HAS_Z, HAS_H, HAS_C, HAS_BIAS, PEEPHOLE, HAS_FLAGS, OUT, SAVE_CELLS,
            SAVE_GATES, GATES_ONLY, ACTIVATION, ACCURATE, BM, BN,
        )  # fmt: skip
    else:
        i_0, i_1 = halves(z_i, BM, BN)
        f_0, f_1 = halves(z_f, BM, BN)
        g_0, g_1 = halves(z_g, BM, BN)
        o_0, o_1 = halves(z_o, BM, BN)
        _forward_cell(
            i_0, f_0, g_0, o_0, n_0 + tl.arange(0, BN // 2),
            m, b, pixel, row_ok, keeps, past_end, group, t, in_t, h_t, h_out_t,
            z_ptr, h_ptr, bias_ptr, peephole_ptr, c_ptr, c_out_ptr, cells_ptr, h_out_ptr, out_ptr, gates_ptr,
            M, H, W, h_stride_t, h_stride_b, h_out_stride_t, h_out_stride_b, out_stride_t, out_stride_b,
            out_stride_c, out_stride_p, CG, G, HAS_Z, HAS_H, HAS_C, HAS_BIAS, PEEPHOLE, HAS_FLAGS, OUT, SAVE_CELLS,
            SAVE_GATES, GATES_ONLY, ACTIVATION, ACCURATE, BM, BN // 2,
        )  # fmt: skip
        _forward_cell(
            i_1, f_1, g_1, o_1, n_0 + BN // 2 + tl.arange(0, BN // 2),
            m, b, pixel, row_ok, keeps, past_end, group, t, in_t, h_t, h_out_t,
            z_ptr, h_ptr, bias_ptr, peephole_ptr, c_ptr, c_out_ptr, cells_ptr, h_out_ptr, out_ptr, gates_ptr,
            M, H, W, h_stride_t, h_stride_b, h_out_stride_t, h_out_stride_b, out_stride_t, out_stride_b,
            out_stride_c, out_stride_p, CG, G, HAS_Z, HAS_H, HAS_C, HAS_BIAS, PEEPHOLE, HAS_FLAGS, OUT, SAVE_CELLS,
            SAVE_GATES, GATES_ONLY, ACTIVATION, ACCURATE, BM, BN // 2,
        )  # fmt: skip


@triton.jit
def _backward_cell(
    dh,  # (BM, BN): gradient of the state after the step, without that of the output
    n,  # (BN,): channel within the group
    m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
    grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
    go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, HAS_C: tl.constexpr, GRAD_OUTPUT: tl.constexpr, PEEPHOLE: tl.constexpr,
    HAS_FLAGS: tl.constexpr, ACTIVATION: tl.constexpr, ACCURATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of the backward step: gradient of the state to those of pre-activations and cell."""
    C: tl.constexpr = G * CG
    n_ok = n < CG
    column = group * CG + n
    mask = row_ok[:, None] & n_ok[None, :]
    state = m[:, None] * C + column[None, :]
    if HAS_FLAGS:
        flag = tl.load(flags_ptr + t.to(tl.int64) * B + b, mask=row_ok, other=0).to(tl.int32)
        past_end = ((flag & 2) != 0)[:, None]
        tl.store(carry_ptr + state, dh, mask=mask & past_end)
    if GRAD_OUTPUT != 0:
        go = grad_output_ptr + t.to(tl.int64) * go_stride_t
        go_rows = b * go_stride_b + y * go_stride_y + x * go_stride_x
        if GRAD_OUTPUT == 1:
            dh += tl.load(go + go_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        else:
            go_t = go + (column * go_stride_c)[:, None] + go_rows[None, :]
            dh += tl.trans(tl.load(go_t, mask=n_ok[:, None] & row_ok[None, :], other=0.0)).to(tl.float32)
    dz_type: tl.constexpr = dz_ptr.dtype.element_ty
    gate_offset = (m * (G * K))[:, None] + (group * K + n)[None, :]
    gates = gates_ptr + gates_t.to(tl.int64) * M * (G * K) + gate_offset
    i_gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    f_gate = tl.load(gates + CG, mask=mask, other=0.0).to(tl.float32)
    g_gate = tl.load(gates + 2 * CG, mask=mask, other=0.0).to(tl.float32)
    o_gate = tl.load(gates + 3 * CG, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + t.to(tl.int64) * M * C + state, mask=mask, other=0.0).to(tl.float32)
    if HAS_C:
        c_before = c_before_ptr + c_before_t.to(tl.int64) * M * C + state
        c_before = tl.load(c_before, mask=mask, other=0.0).to(tl.float32)
        if HAS_FLAGS:
            c_before = tl.where(((flag & 1) != 0)[:, None], 0.0, c_before)
    else:
        c_before = tl.zeros((BM, BN), dtype=tl.float32)
    dc_after = tl.load(dc_ptr + state, mask=mask, other=0.0)
    if PEEPHOLE == 1:
        w_ci = tl.load(peephole_ptr + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        w_cf = tl.load(peephole_ptr + C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
        w_co = tl.load(peephole_ptr + 2 * C + column, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if PEEPHOLE == 2:
        w_pixel = peephole_ptr + pixel[:, None] * C + column[None, :]
        w_ci = tl.load(w_pixel, mask=mask, other=0.0).to(tl.float32)
        w_cf = tl.load(w_pixel + H * W * C, mask=mask, other=0.0).to(tl.float32)
        w_co = tl.load(w_pixel + 2 * H * W * C, mask=mask, other=0.0).to(tl.float32)
    tanh_c = tanh(c, ACCURATE)
    dz_o = dh * tanh_c * gate_slope(o_gate, ACTIVATION)
    dc = dc_after + dh * o_gate * (1.0 - tanh_c * tanh_c)
    if PEEPHOLE != 0:
        dc += dz_o * w_co
    dz_i = dc * g_gate * gate_slope(i_gate, ACTIVATION)
    dz_f = dc * c_before * gate_slope(f_gate, ACTIVATION)
    dz_g = dc * i_gate * (1.0 - g_gate * g_gate)
    dc = dc * f_gate
    if PEEPHOLE != 0:
        dc += dz_i * w_ci + dz_f * w_cf
    if HAS_FLAGS:
        # Selected, not multiplied: what stands past the end may be NaN.
        dz_i = tl.where(past_end, 0.0, dz_i)
        dz_f = tl.where(past_end, 0.0, dz_f)
        dz_g = tl.where(past_end, 0.0, dz_g)
        dz_o = tl.where(past_end, 0.0, dz_o)
        dc = tl.where(((flag & 1) != 0)[:, None], 0.0, dc)
        dc = tl.where(past_end, dc_after, dc)
    dz_out = dz_ptr + dz_out_t.to(tl.int64) * M * (G * K) + gate_offset
    tl.store(dz_out, dz_i.to(dz_type), mask=mask)
    tl.store(dz_out + CG, dz_f.to(dz_type), mask=mask)
    tl.store(dz_out + 2 * CG, dz_g.to(dz_type), mask=mask)
    tl.store(dz_out + 3 * CG, dz_o.to(dz_type), mask=mask)
    tl.store(dc_ptr + state, dc, mask=mask)


@triton.jit(do_not_specialize=["t", "t_after", "dz_t", "dz_out_t", "gates_t", "c_before_t"])
def conv_lstm2d_backward_kernel(
    dz_ptr,  # (n + 1, M, G, 4, Cg): gradients of the pre-activations of the step after; CONV
    w_ptr,  # (taps, G, NB, BN, KP), k = (gate, output channel)
    grad_output_ptr,  # (T, B, C, H, W); GRAD_OUTPUT
    carry_ptr,  # (M, C) float32: gradient of the state that goes past a step unchanged; CARRY
    dc_ptr,  # (M, C) float32: gradient of the cells, in place
    gates_ptr,  # (n, M, G, 4, Cg)
    c_ptr,  # (T, M, C): the cells after every step
    c_before_ptr,  # (..., M, C), of the type of c, or float32; HAS_C
    peephole_ptr,  # (3, C), or (3, H * W, C)
    flags_ptr,  # (T, B) uint8; HAS_FLAGS
    dh_ptr,  # (n, M, C): gradient of the state before the step; not CELL
    t,  # timestep whose cell is gone through backward
    t_after,  # the step that follows it, already done
    dz_t,  # frame of dz
    dz_out_t,  # frame that is written: of dz, or of dh
    gates_t,
    c_before_t,
    M,  # B * H * W
    H,
    W,
    go_stride_t,
    go_stride_b,
    go_stride_c,
    go_stride_y,
    go_stride_x,
    B,
    CG: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,  # 4 * Cg
    RH: tl.constexpr,
    RW: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    PADDING_MODE: tl.constexpr,  # zeros or circular
    KP: tl.constexpr,
    CONV: tl.constexpr,
    CELL: tl.constexpr,
    CARRY: tl.constexpr,
    HAS_C: tl.constexpr,
    GRAD_OUTPUT: tl.constexpr,  # 0: none, 1: channels last, 2: channels first
    PEEPHOLE: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACCURATE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    SLICES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    C: tl.constexpr = G * CG
    NB: tl.constexpr = (CG + BN - 1) // BN
    pid = tl.program_id(0)
    nb = pid % NB
    group = (pid // NB) % G
    m = (pid // (NB * G)) * BM + tl.arange(0, BM)
    row_ok = m < M
    b = m // (H * W)
    pixel = m % (H * W)
    y = pixel // W
    x = pixel % W
    n_0 = nb * BN
    if WIDE:
        m = m.to(tl.int64)
        b = b.to(tl.int64)
        pixel = pixel.to(tl.int64)
        y = y.to(tl.int64)
        x = x.to(tl.int64)
        n_0 = n_0.to(tl.int64)
    n = n_0 + tl.arange(0, BN)
    n_ok = n < CG
    column = group * CG + n
    mask = row_ok[:, None] & n_ok[None, :]
    state = m[:, None] * C + column[None, :]

    dh = tl.zeros((BM, BN), dtype=tl.float32)
    if CONV:
        KB: tl.constexpr = KP // BK
        k = tl.arange(0, BK)
        dz_base = dz_ptr + dz_t.to(tl.int64) * M * (G * K) + group * K
        dz_rows = (m - pixel) * (G * K)  # of the frame's first pixel
        w_tile = w_ptr + (group * NB + nb) * (BN * KP) + tl.arange(0, BN)[None, :] * KP + k[:, None]
        if HAS_FLAGS:
            after = tl.load(flags_ptr + t_after.to(tl.int64) * B + b, mask=row_ok, other=0).to(tl.int32)
            reaches = row_ok & (after == 0)
        else:
            reaches = row_ok
        for i in range(RH * RW * KB):
            tap = i // KB
            k_0 = (i % KB) * BK
            yy = y - (tap // RW) * DIL_H + PAD_H
            xx = x - (tap % RW) * DIL_W + PAD_W
            if PADDING_MODE == 0:
                ok = reaches & (yy >= 0) & (yy < H) & (xx >= 0) & (xx < W)
            else:
                ok = reaches
                yy = neighbour(yy, H, PADDING_MODE)
                xx = neighbour(xx, W, PADDING_MODE)
            rows = dz_rows + (yy * W + xx) * (G * K) + k_0
            if K % BK == 0:
                a_mask = ok[:, None]
            else:
                a_mask = ok[:, None] & (k < K - k_0)[None, :]
            a = tl.load(dz_base + rows[:, None] + k[None, :], mask=a_mask, other=0.0)
            w = tl.load(w_tile + (tap * (G * NB * BN * KP) + k_0))
            dh = tl.dot(a, w, dh, input_precision=PRECISION)
    if CARRY:
        carried = tl.load(carry_ptr + state, mask=mask, other=0.0)
        if CONV:
            dh = tl.where(((after & 2) != 0)[:, None], carried, dh)
        else:
            dh = carried
    if not CELL:
        tl.store(dh_ptr + dz_out_t.to(tl.int64) * M * C + state, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    else:
        if SLICES == 1:
            _backward_cell(
                dh, n, m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN,
            )  # fmt: skip
        elif SLICES == 2:
            dh_0, dh_1 = halves(dh, BM, BN)
            _backward_cell(
                dh_0, n_0 + tl.arange(0, BN // 2),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 2,
            )  # fmt: skip
            _backward_cell(
                dh_1, n_0 + BN // 2 + tl.arange(0, BN // 2),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 2,
            )  # fmt: skip
        else:
            left, right = halves(dh, BM, BN)
            dh_0, dh_1 = halves(left, BM, BN // 2)
            dh_2, dh_3 = halves(right, BM, BN // 2)
            _backward_cell(
                dh_0, n_0 + tl.arange(0, BN // 4),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 4,
            )  # fmt: skip
            _backward_cell(
                dh_1, n_0 + 1 * (BN // 4) + tl.arange(0, BN // 4),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 4,
            )  # fmt: skip
            _backward_cell(
                dh_2, n_0 + 2 * (BN // 4) + tl.arange(0, BN // 4),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 4,
            )  # fmt: skip
            _backward_cell(
                dh_3, n_0 + 3 * (BN // 4) + tl.arange(0, BN // 4),
                m, b, pixel, y, x, row_ok, group, t, dz_out_t, gates_t, c_before_t, dz_ptr,
                grad_output_ptr, carry_ptr, dc_ptr, gates_ptr, c_ptr, c_before_ptr, peephole_ptr, flags_ptr, M, H, W,
                go_stride_t, go_stride_b, go_stride_c, go_stride_y, go_stride_x, B, CG, G, K, HAS_C, GRAD_OUTPUT,
                PEEPHOLE, HAS_FLAGS, ACTIVATION, ACCURATE, BM, BN // 4,
            )  # fmt: skip
