"""The pooled-gate cell over a sequence: the recurrence in one launch, what needs no order batched over time."""

from __future__ import annotations

from collections.abc import Sequence

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
    frames_nchw,
    masked_frames,
    nchw,
    nhwc,
    pad_frames,
    previous_frames,
    unpad_gradient,
)
from .parameters import (
    Kernels,
    address,
    chunk_elements,
    contiguous_nhwc,
    pack_depthwise,
    pack_pointwise,
    padded,
    recurrent_gather,
    transposed_gather,
    with_dense_images,
)
from .sequence import SequenceProblem


class Problem(SequenceProblem):
    """What forward, recomputation and backward of one call share."""

    def __init__(
        self,
        kernels: Kernels,
        input: Tensor,
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
    ) -> None:
        size = conv_output_size(
            (input.size(3), input.size(4)),
            (depthwise_ih.size(2), depthwise_ih.size(3)),
            options.stride,
            options.padding,
            options.dilation,
        )
        super().__init__(kernels, input, c_0, pointwise_ih.size(0), size, step_flags, options)
        self.gate_weight_ih, self.gate_weight_hh, self.gate_bias = gate_weight_ih, gate_weight_hh, gate_bias
        self.depthwise_ih, self.depthwise_hh = depthwise_ih, depthwise_hh
        self.pointwise_ih, self.pointwise_hh, self.bias = pointwise_ih, pointwise_hh, bias
        self.same_padding = same_padding((depthwise_hh.size(2), depthwise_hh.size(3)), options.recurrent_dilation)

    def pooled_input(self) -> Tensor:  # (T, B, Cin) float32
        return masked_frames(self.input, self.step_flags, 0, self.steps).mean((3, 4), dtype=torch.float32)

    def gate_part(self) -> Tensor:  # (T, B, 3 * C) float32
        """The input's part of the gates, with the bias."""
        bias = None if self.gate_bias is None else self.gate_bias.float()
        return F.linear(self.pooled_input(), self.gate_weight_ih.float(), bias).contiguous()

    def depthwise_input(self, begin: int, end: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The input's depthwise convolution (n, Cin, Ho, Wo), the frames it was given, and their padding."""
        o = self.options
        frames, padding = pad_frames(
            frames_nchw(masked_frames(self.input, self.step_flags, begin, end)), o.padding, "zeros"
        )
        return F.conv2d(frames, self.depthwise_ih, None, o.stride, padding, o.dilation, frames.size(1)), frames, padding

    def candidate_part(self) -> Tensor:  # (T, B, Ho, Wo, C)
        """The input's part of the candidate, with the bias."""
        parts = []
        chunk = chunk_steps(self.steps, self.frame_bytes(self.input.size(2)))
        for begin, end in chunks(self.steps, chunk):
            y, _, _ = self.depthwise_input(begin, end)
            z = F.conv2d(y, self.pointwise_ih[:, :, None, None], self.bias)
            parts.append(nhwc(z).contiguous())
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(self.steps, self.batch, self.height, self.width, self.channels)

    def scratch(self, sums: int) -> tuple[Tensor, Tensor]:
        """Room for the sums of each block, and the counters of the groups."""
        stored = padded(self.channels, chunk_elements(self.input.dtype))
        blocks = self.kernels.module.group_blocks
        partial = self.input.new_empty((self.batch, blocks, sums, stored), dtype=torch.float32)
        return partial, self.counters()


def forward(
    kernels: Kernels,
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
    p = Problem(
        kernels, input, c_0, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih,
        pointwise_hh, bias, step_flags, options,
    )  # fmt: skip
    c_type = state_dtype(input.dtype)
    output = empty_frames_like(input, p.channels, p.height, p.width)
    h_n = empty_state_like(input, p.channels, p.height, p.width, input.dtype)
    c_n = empty_state_like(input, p.channels, p.height, p.width, c_type)
    keep = save != SAVE_NOTHING
    cells = p.frames(p.steps, p.channels) if keep else input.new_empty((0,))
    gates = input.new_empty((p.steps, p.batch, 3 * p.channels) if keep else (0,), dtype=c_type)
    if p.empty:
        no_frames = p.frames(p.steps, p.channels) if save == SAVE_GATES else input.new_empty((0,))
        return output, h_n, c_n, gates, no_frames, cells

    stored_channels = padded(p.channels, chunk_elements(input.dtype))
    direct = frames_are_channels_last(input) and stored_channels == p.channels
    states = nhwc(output) if direct else p.frames(p.steps, stored_channels)
    c = p.running_c()
    candidate, gate_part, first_state = p.candidate_part(), p.gate_part(), p.initial_in_chunks(h_0)
    depthwise, weight = pack_depthwise(depthwise_hh), pack_pointwise(pointwise_hh.t(), kernels.number)
    gate_weight = gate_weight_hh.contiguous()
    partial, counters = p.scratch(1)
    some_gates = gates if keep else input.new_empty((1, p.batch, 3 * p.channels), dtype=torch.float32)
    block = kernels.module.PooledGateForward()
    block.s = p.sequence_block()
    block.hidden = recurrent_gather(kernels.module, states, depthwise_hh, options.recurrent_dilation)
    block.h_0, block.gate_part, block.gate_weight = address(first_state), address(gate_part), address(gate_weight)
    block.depthwise, block.weight, block.columns = address(depthwise), address(weight), weight.size(1)
    block.candidate, block.store_candidate = address(candidate), save == SAVE_GATES
    block.gates, block.gates_step_stride = address(some_gates), some_gates.stride(0) if keep else 0
    block.c, block.cells = address(c), address(cells if keep else None)
    block.partial, block.counters = address(partial), address(counters)
    kernels.module.pooled_gate_forward(kernels.number, block)

    if not direct:
        output.copy_(nchw(states[..., : p.channels]))
    h_n.copy_(nchw(p.last(nhwc(output), h_0)))
    c_n.copy_(nchw(c))
    return output, h_n, c_n, gates, candidate if save == SAVE_GATES else input.new_empty((0,)), cells


def backward(
    kernels: Kernels,
    grad_output: Tensor | None,
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
    gates: Tensor,  # (T, B, 3 * C)
    candidate: Tensor,  # (T, B, Ho, Wo, C), or (0,): computed again
    cells: Tensor,  # (T, B, Ho, Wo, C)
    options: ConvLSTMOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """See :meth:`fused_convlstm.backends.base.Backend.pooled_gate_conv_lstm2d_backward`."""
    p = Problem(
        kernels, input, c_0, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih,
        pointwise_hh, bias, step_flags, options,
    )  # fmt: skip
    arguments = (
        input, h_0, c_0, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih,
        pointwise_hh, bias,
    )  # fmt: skip
    grads = [
        empty_gradient(k, tensor, input) if need and tensor is not None else None
        for k, (tensor, need) in enumerate(zip(arguments, needs, strict=True))
    ]
    if p.empty:
        return tuple(grad if grad is None else grad.zero_() for grad in grads)
    run = BackwardPass(p, output, h_0, grads)
    candidate = run.recomputed_candidate() if candidate.numel() == 0 else candidate
    grad_candidate, grad_gates = run.recurrence(grad_output, grad_h_n, grad_c_n, gates, candidate, cells)
    run.batched(grad_candidate, grad_gates)
    return tuple(grads)


class BackwardPass:
    """The backward of one call: the recurrence, then everything that is batched over time."""

    def __init__(self, problem: Problem, output: Tensor, h_0: Tensor | None, grads: list[Tensor | None]) -> None:
        self.p, self.output, self.h_0, self.grads = problem, output, h_0, grads

    def chunk(self) -> int:
        channels = max(self.p.channels, self.p.input.size(2))
        return chunk_steps(self.p.steps, self.p.frame_bytes(channels))

    def depthwise_hidden(self, begin: int, end: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The depthwise convolution of h before each step (n, C, Ho, Wo), the frames it was given, their padding."""
        p = self.p
        h_0 = None if self.h_0 is None else nhwc(self.h_0)[None]
        before = previous_frames(nhwc(self.output), h_0, p.step_flags, begin, end, p.options.reverse)
        frames, padding = pad_frames(nchw(before.flatten(0, 1)), p.same_padding, "zeros")
        y = F.conv2d(frames, p.depthwise_hh, None, (1, 1), padding, p.options.recurrent_dilation, p.channels)
        return y, frames, padding

    def recomputed_candidate(self) -> Tensor:  # (T, B, Ho, Wo, C)
        p = self.p
        candidate = p.candidate_part()
        for begin, end in chunks(p.steps, self.chunk()):
            y, _, _ = self.depthwise_hidden(begin, end)
            part = nhwc(F.conv2d(y, p.pointwise_hh[:, :, None, None])).view_as(candidate[begin:end])
            candidate[begin:end] = torch.tanh(candidate[begin:end].float() + part).to(candidate.dtype)
        return candidate

    def recurrence(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        gates: Tensor,
        candidate: Tensor,
        cells: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the candidate (T, B, Ho, Wo, C) and of the gates (T, B, 3 * C), both before their
        activations; writes those of h_0 and c_0."""
        p, kernels = self.p, self.p.kernels
        stored_channels = padded(p.channels, chunk_elements(p.input.dtype))
        grad_candidate = p.frames(p.steps, p.channels)
        grad_gates = torch.empty_like(gates)
        grad_c = p.frames(1, p.channels, torch.float32)[0]
        grad_c.zero_() if grad_c_n is None else grad_c.copy_(nhwc(grad_c_n))
        last_grad = None if grad_h_n is None else contiguous_nhwc(grad_h_n)
        grad_h_0 = None if self.grads[1] is None else p.frames(1, p.channels)[0]
        frames = p.frames(2, stored_channels)
        depthwise, weight = pack_depthwise(p.depthwise_hh.flip(2, 3)), pack_pointwise(p.pointwise_hh, kernels.number)
        gate_weight = p.gate_weight_hh.t().contiguous()
        partial, counters = p.scratch(3)
        grad_pooled = grad_gates.new_empty((p.batch, p.channels))
        block = kernels.module.PooledGateBackward()
        block.s = p.sequence_block()
        block.hidden = transposed_gather(kernels.module, frames, p.depthwise_hh, p.options.recurrent_dilation, first=0)
        block.gate_weight, block.depthwise = address(gate_weight), address(depthwise)
        block.weight, block.columns = address(weight), weight.size(1)
        block.sink = 0 if p.tables is None else address(p.tables.sink)
        block.candidate, block.gates, block.cells = address(candidate), address(gates), address(cells)
        if grad_output is not None:
            output_part = with_dense_images(grad_output)
            block.grad_output = address(output_part)
            block.grad_output_step_stride, block.grad_output_image_stride = output_part.stride()[:2]
        block.grad_h_n, block.grad_c, block.grad_h_0 = address(last_grad), address(grad_c), address(grad_h_0)
        block.grad_candidate, block.grad_gates = address(grad_candidate), address(grad_gates)
        block.partial, block.grad_pooled, block.counters = address(partial), address(grad_pooled), address(counters)
        kernels.module.pooled_gate_backward(kernels.number, block)
        if self.grads[1] is not None and grad_h_0 is not None:
            self.grads[1].copy_(nchw(grad_h_0))
        if self.grads[2] is not None:
            self.grads[2].copy_(nchw(grad_c))
        return grad_candidate, grad_gates

    def batched(self, grad_candidate: Tensor, grad_gates: Tensor) -> None:
        """Gradients of the input and of all weights."""
        p, o = self.p, self.p.options
        grad_input, gate_ih, gate_hh, gate_bias = self.grads[0], *self.grads[3:6]
        rows = grad_gates.flatten(0, 1)  # (T * B, 3 * C)
        if gate_ih is not None:
            gate_ih.copy_(rows.t() @ p.pooled_input().flatten(0, 1))
        if gate_hh is not None:
            pooled = self.output.mean((3, 4), dtype=torch.float32)[:, :, None, None]  # (T, B, 1, 1, C)
            h_0 = None if self.h_0 is None else self.h_0.mean((2, 3), dtype=torch.float32)[None, :, None, None]
            before = previous_frames(pooled, h_0, p.step_flags, 0, p.steps, o.reverse)
            gate_hh.copy_(rows.t() @ before.flatten(0, 1).flatten(1))
        if gate_bias is not None:
            gate_bias.copy_(rows.sum(0))
        pixels = p.input.size(3) * p.input.size(4)
        of_pooled_input = (grad_gates @ p.gate_weight_ih.float() / pixels)[..., None, None]  # (T, B, Cin, 1, 1)
        sums = {k: Sum() for k in range(6, 11) if self.grads[k] is not None}
        for begin, end in chunks(p.steps, self.chunk()):
            z = nchw(grad_candidate[begin:end].flatten(0, 1))
            if 10 in sums:
                sums[10].add(grad_candidate[begin:end].sum((0, 1, 2, 3), dtype=torch.float32))
            if grad_input is not None or 6 in sums or 8 in sums:
                y, frames, padding = p.depthwise_input(begin, end)
                for_y, for_pointwise = _pointwise_backward(z, y, p.pointwise_ih)
                for_input, for_depthwise, _ = torch.ops.aten.convolution_backward(
                    for_y, frames, p.depthwise_ih, None, o.stride, padding, o.dilation, False, [0, 0], frames.size(1),
                    [grad_input is not None, 6 in sums, False],
                )  # fmt: skip
                if 6 in sums:
                    sums[6].add(for_depthwise)
                if 8 in sums:
                    sums[8].add(for_pointwise)
                if grad_input is not None:
                    size = (p.input.size(3), p.input.size(4))
                    part = unpad_gradient(for_input, size, o.padding, "zeros")
                    part = part.unflatten(0, (end - begin, p.batch))
                    grad_input[begin:end] = part + of_pooled_input[begin:end]
            if 7 in sums or 9 in sums:
                y, frames, padding = self.depthwise_hidden(begin, end)
                for_y, for_pointwise = _pointwise_backward(z, y, p.pointwise_hh)
                if 7 in sums:
                    _, for_depthwise, _ = torch.ops.aten.convolution_backward(
                        for_y, frames, p.depthwise_hh, None, (1, 1), padding, o.recurrent_dilation, False, [0, 0],
                        p.channels, [False, True, False],
                    )  # fmt: skip
                    sums[7].add(for_depthwise)
                if 9 in sums:
                    sums[9].add(for_pointwise)
        for k, total in sums.items():
            grad = self.grads[k]
            assert grad is not None
            total.write(grad)


def _pointwise_backward(
    grad: Tensor,  # (N, C, Ho, Wo)
    input: Tensor,  # (N, K, Ho, Wo)
    weight: Tensor,  # (C, K)
) -> tuple[Tensor, Tensor]:  # (N, K, Ho, Wo), (C, K)
    """Gradients of a 1x1 convolution."""
    for_input, for_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight[:, :, None, None], None, (1, 1), (0, 0), (1, 1), False, [0, 0], 1, [True, True, False]
    )
    return for_input, for_weight.flatten(1)
