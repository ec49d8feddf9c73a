"""The ConvLSTM over a sequence: the steps in the extension, everything that needs no order batched over time."""

from __future__ import annotations

from collections.abc import Sequence
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
    gates_innermost,
    gates_outermost,
    in_chunks,
    input_gather,
    pack_gate_gradients,
    pack_gates,
    packed,
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
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        step_flags: Tensor | None,
        options: ConvLSTMOptions,
    ) -> None:
        size = conv_output_size(
            (input.size(3), input.size(4)),
            (weight_ih.size(2), weight_ih.size(3)),
            options.stride,
            options.padding,
            options.dilation,
        )
        super().__init__(kernels, input, c_0, weight_hh.size(1), size, step_flags, options)
        self.weight_ih, self.weight_hh = weight_ih, weight_hh
        self.bias = None if bias is None else bias.contiguous()
        self.peephole = None if peephole is None else peephole.contiguous()

    def sequence_block(self) -> Any:
        s = super().sequence_block()
        s.peephole = address(self.peephole)
        return s

    def input_part(self) -> Tensor:  # (T, B, Ho, Wo, 4 * C), gates innermost
        """The input convolution of all steps, with the bias."""
        o = self.options
        bias = None if self.bias is None else gates_innermost(self.bias)
        weight = gates_innermost(self.weight_ih).contiguous(memory_format=torch.channels_last)
        frames, padding = pad_frames(frames_nchw(self.input), o.padding, "zeros")
        z = F.conv2d(frames, weight, bias, o.stride, padding, o.dilation)
        return nhwc(z).contiguous().view(self.steps, self.batch, self.height, self.width, 4 * self.channels)

    def forward_block(
        self, states: Tensor, h_0: Tensor | None, cells: Tensor | None, input_frames: Tensor | None
    ) -> Any:
        """``states`` (T, B, Ho, Wo, whole chunks), ``cells`` (T, B, Ho, Wo, C); the input is convolved in the kernel if
        its frames are given, else its convolution is expected in the gates."""
        module, o = self.kernels.module, self.options
        p = module.ConvLSTMForward()
        p.s = self.sequence_block()
        p.hidden = recurrent_gather(module, states, self.weight_hh, o.recurrent_dilation)
        p.h_0 = address(h_0)
        p.cells = address(cells)
        if input_frames is not None:
            kernel_size = (self.weight_ih.size(2), self.weight_ih.size(3))
            p.input = input_gather(module, input_frames, kernel_size, o)
            p.bias = address(self.bias)
        return p

    def forward_weight(self, with_input: bool) -> Tensor:
        weights = (self.weight_ih, self.weight_hh) if with_input else (self.weight_hh,)
        return packed(pack_gates, weights, self.kernels.number)


def forward(
    kernels: Kernels,
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
    p = Problem(kernels, input, c_0, weight_ih, weight_hh, bias, peephole, step_flags, options)
    output = empty_frames_like(input, p.channels, p.height, p.width)
    h_n = empty_state_like(input, p.channels, p.height, p.width, input.dtype)
    c_n = empty_state_like(input, p.channels, p.height, p.width, state_dtype(input.dtype))
    no_gates = input.new_empty((0,))
    cells_dtype = kept_cells_dtype(input.dtype, peephole is not None)
    keep = save != SAVE_NOTHING
    cells = p.frames(p.steps, p.channels, cells_dtype) if keep else input.new_empty((0,), dtype=cells_dtype)
    if p.empty:
        return output, h_n, c_n, p.frames(p.steps, 4 * p.channels) if save == SAVE_GATES else no_gates, cells

    stored_channels = padded(p.channels, chunk_elements(input.dtype))
    direct = frames_are_channels_last(input) and stored_channels == p.channels
    states = nhwc(output) if direct else p.frames(p.steps, stored_channels)
    c = p.running_c()
    gates = p.input_part() if save == SAVE_GATES else None
    input_frames = in_chunks(input) if gates is None else None
    weight = p.forward_weight(with_input=gates is None)
    first_state = p.initial_in_chunks(h_0)
    block = p.forward_block(states, first_state, cells if keep else None, input_frames)
    block.weight, block.columns, block.c = address(weight), weight.size(1), address(c)
    block.gates, block.store_gates = address(gates), gates is not None
    counters = p.counters()
    block.group.counters = address(counters)
    kernels.module.conv_lstm_forward(kernels.number, block)

    if not direct:
        output.copy_(nchw(states[..., : p.channels]))
    h_n.copy_(nchw(p.last(nhwc(output), h_0)))
    c_n.copy_(nchw(c))
    return output, h_n, c_n, no_gates if gates is None else gates, cells


def backward(
    kernels: Kernels,
    grad_output: Tensor | None,
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
    p = Problem(kernels, input, c_0, weight_ih, weight_hh, bias, peephole, step_flags, options)
    arguments = (input, h_0, c_0, weight_ih, weight_hh, bias, peephole)
    grads = [
        empty_gradient(k, tensor, input) if need and tensor is not None else None
        for k, (tensor, need) in enumerate(zip(arguments, needs, strict=True))
    ]
    if p.empty:
        return tuple(grad if grad is None else grad.zero_() for grad in grads)
    return BackwardPass(p, output, h_0, gates, cells, grads).run(grad_output, grad_h_n, grad_c_n)


class BackwardPass:
    """The backward of one call, chunk by chunk of time, so that the buffers 4 * C wide stay small."""

    def __init__(
        self,
        problem: Problem,
        output: Tensor,
        h_0: Tensor | None,
        gates: Tensor,  # (T, B, Ho, Wo, 4 * C), or (0,): computed again
        cells: Tensor,  # (T, B, Ho, Wo, C)
        grads: list[Tensor | None],  # of input, h_0, c_0, weight_ih, weight_hh, bias, peephole
    ) -> None:
        self.p, self.output, self.h_0, self.gates, self.cells, self.grads = problem, output, h_0, gates, cells, grads
        self.recompute = gates.numel() == 0
        self.sums = {k: Sum() for k in range(3, 7) if grads[k] is not None}
        self.forward_weight = problem.forward_weight(with_input=True) if self.recompute else None
        self.first_state = problem.initial_in_chunks(h_0) if self.recompute else None

    def chunk(self) -> int:
        p = self.p
        if p.tables is not None and p.options.reverse and self.grads[1] is not None:
            # The first step of a short sequence, whose gradient h_0 needs, may lie in any chunk.
            return p.steps
        return chunk_steps(p.steps, p.frame_bytes(4 * p.channels))

    def run(
        self, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        p, module = self.p, self.p.kernels.module
        reverse = p.options.reverse
        elements = chunk_elements(p.input.dtype)
        length = self.chunk()
        # The steps of a chunk and the one after it, in whose product the chunk begins.
        slots = p.frames(min(length, p.steps) + 1, padded(4 * p.channels, elements))
        grad_c = p.frames(1, p.channels, torch.float32)[0]
        grad_c.zero_() if grad_c_n is None else grad_c.copy_(nhwc(grad_c_n))
        last_grad = None if grad_h_n is None else contiguous_nhwc(grad_h_n)
        weight = packed(pack_gate_gradients, (p.weight_hh,), p.kernels.number)
        block = module.ConvLSTMBackward()
        block.s = p.sequence_block()
        block.weight, block.columns = address(weight), weight.size(1)
        block.sink = 0 if p.tables is None else address(p.tables.sink)
        block.cells, block.grad_c, block.grad_h_n = address(self.cells), address(grad_c), address(last_grad)
        counters = p.counters()
        block.group.counters = address(counters)

        first = 0
        for begin, end in chunks(p.steps, length, backward=not reverse):
            count = end - begin
            after = first  # where the step that was computed last lies, before the slots get their new meaning
            if reverse:
                first_step = begin - 1  # slot 0 is the step after the chunk, in the order of the sequence
                if begin > 0:
                    slots[0].copy_(slots[after])
                first = count
            else:
                first_step = begin
                if end < p.steps:
                    slots[count].copy_(slots[after])
                first = 0
            block.grad = transposed_gather(module, slots, p.weight_hh, p.options.recurrent_dilation, 0)
            block.grad_first = first_step
            gates = self.recomputed_gates(begin, end) if self.recompute else self.gates[begin:end]
            block.gates, block.gates_first = address(gates), begin
            if grad_output is not None:
                part = with_dense_images(grad_output[begin:end])
                block.grad_output, block.grad_output_first = address(part), begin
                block.grad_output_step_stride, block.grad_output_image_stride = part.stride(0), part.stride(1)
            module.conv_lstm_backward(p.kernels.number, block, begin, count)
            del gates  # computed again, they would take memory until those of the next chunk are there
            used = slots[1 : count + 1] if reverse else slots[:count]
            self.batched(begin, end, used[..., : 4 * p.channels])
        grad_h_0 = self.grads[1]
        if grad_h_0 is not None:
            result = p.frames(1, p.channels)[0]
            block.grad_h_0 = address(result)
            module.conv_lstm_backward_initial(p.kernels.number, block)
            grad_h_0.copy_(nchw(result))
        if self.grads[2] is not None:
            self.grads[2].copy_(nchw(grad_c))
        for k, total in self.sums.items():
            grad = self.grads[k]
            assert grad is not None
            total.write(grad)
        return tuple(self.grads)

    def recomputed_gates(self, begin: int, end: int) -> Tensor:  # (end - begin, B, Ho, Wo, 4 * C)
        """The gates of these steps in one launch: every state is known."""
        p, module = self.p, self.p.kernels.module
        gates = p.frames(end - begin, 4 * p.channels)
        lowest, highest = (begin, min(end + 1, p.steps)) if p.options.reverse else (max(begin - 1, 0), end)
        states = in_chunks(self.output[lowest:highest])
        frames = in_chunks(p.input[begin:end])
        weight = self.forward_weight
        assert weight is not None
        block = p.forward_block(states, self.first_state, self.cells, frames)
        block.hidden = recurrent_gather(module, states, p.weight_hh, p.options.recurrent_dilation, lowest)
        kernel_size = (p.weight_ih.size(2), p.weight_ih.size(3))
        block.input = input_gather(module, frames, kernel_size, p.options, begin)
        block.weight, block.columns = address(weight), weight.size(1)
        block.gates, block.gates_first, block.store_gates = address(gates), begin, True
        module.conv_lstm_gates(p.kernels.number, block, begin, end - begin)
        return gates

    def batched(self, begin: int, end: int, grad_gates: Tensor) -> None:
        """What the gradients of the gates (n, B, Ho, Wo, 4 * C) of these steps give for the input and the weights."""
        p, o = self.p, self.p.options
        z = nchw(grad_gates.flatten(0, 1))
        if not z.is_contiguous(memory_format=torch.channels_last):
            z = z.contiguous(memory_format=torch.channels_last)
        grad_input = self.grads[0]
        if 5 in self.sums:  # convolution_backward would sum in the gradient's own precision
            self.sums[5].add(gates_outermost(grad_gates.sum((0, 1, 2, 3), dtype=torch.float32)))
        if grad_input is not None or 3 in self.sums:
            frames, padding = pad_frames(
                frames_nchw(masked_frames(p.input, p.step_flags, begin, end)), o.padding, "zeros"
            )
            mask = [grad_input is not None, 3 in self.sums, False]
            weight = gates_innermost(p.weight_ih).contiguous(memory_format=torch.channels_last)
            for_input, for_weight, _ = torch.ops.aten.convolution_backward(
                z, frames, weight, None, o.stride, padding, o.dilation, False, [0, 0], 1, mask
            )
            if grad_input is not None:
                size = (p.input.size(3), p.input.size(4))
                part = unpad_gradient(for_input, size, o.padding, "zeros")
                grad_input[begin:end] = part.unflatten(0, (end - begin, p.batch))
            if 3 in self.sums:
                self.sums[3].add(gates_outermost(for_weight))
        if 4 in self.sums:
            h_0 = None if self.h_0 is None else nhwc(self.h_0)[None]
            before = previous_frames(nhwc(self.output), h_0, p.step_flags, begin, end, o.reverse)
            same = same_padding((p.weight_hh.size(2), p.weight_hh.size(3)), o.recurrent_dilation)
            frames, padding = pad_frames(nchw(before.flatten(0, 1)), same, "zeros")
            weight = gates_innermost(p.weight_hh).contiguous(memory_format=torch.channels_last)
            _, for_weight, _ = torch.ops.aten.convolution_backward(
                z, frames, weight, None, (1, 1), padding, o.recurrent_dilation, False, [0, 0], 1, [False, True, False]
            )
            self.sums[4].add(gates_outermost(for_weight))
        if 6 in self.sums:
            dz = grad_gates.unflatten(-1, (p.channels, 4)).float()
            c_0 = None if p.c_0 is None else p.c_0[None]
            c_before = previous_frames(self.cells, c_0, p.step_flags, begin, end, o.reverse)
            pairs = ((dz[..., 0], c_before), (dz[..., 1], c_before), (dz[..., 3], self.cells[begin:end]))
            self.sums[6].add(torch.stack([(grad * cell).sum((0, 1, 2, 3)) for grad, cell in pairs]))
