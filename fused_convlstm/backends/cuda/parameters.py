"""From tensors to the parameter blocks of the extension, and weights in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import FLAG_PAST_END, FLAG_RESET, ConvLSTMOptions, same_padding
from ..frames import nhwc
from ..tf32 import round_to_tf32

CHUNK_BYTES = 16  # the unit of asynchronous copies
STAGE_CHUNKS = 4  # of k, that the products take at a time
COLUMNS = 128  # the widest tile: columns are padded to a multiple

GATE_ACTIVATIONS = ("sigmoid", "hard_sigmoid", "hard_sigmoid_keras2")  # in the order of csrc/cuda/math.cuh

# csrc/cuda/params.h: Number and StepCode
HALF, BFLOAT16, TF32, FLOAT32 = range(4)
OUTSIDE, NOTHING, PAST_END = -1, -2, -3


@dataclass(frozen=True)
class Kernels:
    """The extension and how to call it for one sequence."""

    module: Any  # fused_convlstm._cuda, or the host build of the same sources
    number: int  # number format
    device: int
    stream: int
    tile: int = 0  # 0: chosen by the launcher


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def chunk_elements(dtype: torch.dtype) -> int:
    """Elements of a 16-byte chunk."""
    return CHUNK_BYTES // dtype.itemsize


def dense_images(frames: Tensor) -> bool:  # (T, B, H, W, C)
    """Whether the pixels of each image lie one behind the other, and the images at multiples of a chunk."""
    width, channels = frames.shape[3:]
    return (
        frames.stride()[2:] == (width * channels, channels, 1)
        and frames.data_ptr() % CHUNK_BYTES == 0
        and all(stride % chunk_elements(frames.dtype) == 0 for stride in frames.stride()[:2])
    )


def in_chunks(frames: Tensor) -> Tensor:  # (T, B, C, H, W) -> (T, B, H, W, padded C)
    """Frames that the kernels can gather: channels innermost, a whole number of chunks a pixel, images dense.

    Copied only if they lie otherwise. What pads the channels is zero."""
    channels, elements = frames.size(2), chunk_elements(frames.dtype)
    view = nhwc(frames)
    if channels % elements == 0 and dense_images(view):
        return view
    whole = frames.new_empty((*view.shape[:-1], padded(channels, elements)))
    whole[..., :channels] = view
    whole[..., channels:] = 0
    return whole


def contiguous_nhwc(tensor: Tensor) -> Tensor:  # (..., C, H, W) -> (..., H, W, C)
    """Contiguous and aligned to a chunk; copied only if it has to be."""
    view = nhwc(tensor).contiguous()
    return view if view.data_ptr() % CHUNK_BYTES == 0 else view.clone()


def with_dense_images(frames: Tensor) -> Tensor:  # (T, B, C, H, W) -> (T, B, H, W, C)
    """Each image contiguous and aligned to a chunk; copied only if it has to be."""
    view = nhwc(frames)
    return view if dense_images(view) else contiguous_nhwc(frames)


def gather(
    module: Any,
    frames: Tensor,  # (T, B, H, W, whole chunks)
    kernel_size: tuple[int, int],
    padding: tuple[int, int],  # top, left
    stride: tuple[int, int],
    dilation: tuple[int, int],
    first_step: int = 0,  # the step that ``frames`` begins with
) -> Any:
    """The ``Gather`` block of a convolution over these frames, addressed by the number of a step."""
    g = module.Gather()
    size = frames.element_size()
    g.step_stride, g.image_stride = frames.stride(0) * size, frames.stride(1) * size
    # Steps count from 0 in the kernels. The address of a step that is not there is never used, and may lie below 0.
    g.frames = (frames.data_ptr() - first_step * g.step_stride) % 2**64
    g.height, g.width, g.chunks = frames.size(2), frames.size(3), frames.size(4) * size // CHUNK_BYTES
    g.kernel_h, g.kernel_w = kernel_size
    g.pad_top, g.pad_left = padding
    g.stride_h, g.stride_w = stride
    g.dilation_h, g.dilation_w = dilation
    return g


def recurrent_gather(module: Any, frames: Tensor, weight_hh: Tensor, dilation: tuple[int, int], first: int = 0) -> Any:
    """That of the recurrent convolution over h."""
    kernel_size = (weight_hh.size(2), weight_hh.size(3))
    top, _, left, _ = same_padding(kernel_size, dilation)
    return gather(module, frames, kernel_size, (top, left), (1, 1), dilation, first)


def transposed_gather(module: Any, frames: Tensor, weight_hh: Tensor, dilation: tuple[int, int], first: int) -> Any:
    """That of the gradient of the recurrent convolution with respect to h, over the gradient of its result: the
    kernel is flipped, so what stood before a pixel stands behind it."""
    kernel_size = (weight_hh.size(2), weight_hh.size(3))
    _, bottom, _, right = same_padding(kernel_size, dilation)
    return gather(module, frames, kernel_size, (bottom, right), (1, 1), dilation, first)


def input_gather(
    module: Any, frames: Tensor, kernel_size: tuple[int, int], options: ConvLSTMOptions, first: int = 0
) -> Any:
    """That of the input convolution."""
    top, _, left, _ = options.padding
    return gather(module, frames, kernel_size, (top, left), options.stride, options.dilation, first)


def _zero_padded(tensor: Tensor, *ends: tuple[int, int]) -> Tensor:
    """With zeros behind it so that each dimension of ``ends``, (dimension, multiple), has a multiple of that size.

    Copied only if it has to be: a short call spends most of its time on launching such copies."""
    pads = [0] * (2 * tensor.dim())
    for dim, multiple in ends:
        pads[2 * (tensor.dim() - dim) - 1] = padded(tensor.size(dim), multiple) - tensor.size(dim)
    return F.pad(tensor, pads) if any(pads) else tensor


def pack_gates(weight: Tensor) -> Tensor:  # (4 * C, K, kh, kw) -> (taps, k chunks, 5 dims of columns, elements)
    """The weights of the forward product.

    Rows run over (tap, input channel), channels padded to whole chunks. Of every 64 columns, sixteen channels with
    their gates: see ``gates_of_thread`` in csrc/cuda/conv_lstm.cuh."""
    channels, inner, elements = weight.size(0) // 4, weight.size(1), chunk_elements(weight.dtype)
    whole = weight.reshape(2, 2, channels, inner, -1)  # gate / 2, gate % 2, channel, k, tap
    whole = _zero_padded(whole, (2, COLUMNS // 4), (3, elements))
    # gate / 2, gate % 2, sixteen, quad, j, chunk, element, tap
    w: Tensor = whole.unflatten(3, (-1, elements)).unflatten(2, (-1, 4, 4))
    return w.permute(7, 5, 2, 4, 0, 3, 1, 6)


def pack_gate_gradients(weight: Tensor) -> Tensor:
    # (4 * C, K, kh, kw) -> (taps, k chunks, 4 dims of columns, elements / 4, 4)
    """The weights of the backward product.

    Rows run over (tap in reverse, output channel, gate), columns over the input channels: of every 32, see
    ``channels_of_thread`` in csrc/cuda/conv_lstm.cuh."""
    channels, inner, elements = weight.size(0) // 4, weight.size(1), chunk_elements(weight.dtype)
    whole = weight.reshape(4, channels, inner, -1).flip(3)  # gate, channel, k, tap
    whole = _zero_padded(whole, (1, elements // 4), (2, COLUMNS))
    # gate, chunk, channel, thirty-two, fragment, quad, e, tap
    w: Tensor = whole.unflatten(2, (-1, 4, 4, 2)).unflatten(1, (-1, elements // 4))
    return w.permute(7, 1, 3, 5, 4, 6, 2, 0)


def pack_pointwise(matrix: Tensor, number: int) -> Tensor:  # (K, N) -> (k chunks, columns, elements)
    """A matrix as the right operand of a product, columns in the order of ``channels_of_thread``."""
    matrix = round_to_tf32(matrix) if number == TF32 else matrix
    elements = chunk_elements(matrix.dtype)
    whole = _zero_padded(matrix, (0, elements * STAGE_CHUNKS), (1, COLUMNS))
    # chunk, element, thirty-two, fragment, quad, e
    w: Tensor = whole.unflatten(1, (-1, 4, 4, 2)).unflatten(0, (-1, elements))
    return w.permute(0, 2, 4, 3, 5, 1).contiguous().view(w.size(0), -1, elements)


def pack_depthwise(weight: Tensor) -> Tensor:  # (C, 1, kh, kw) -> (taps, whole chunks)
    """A depthwise kernel with its channels innermost. A copy, because a weight may begin anywhere."""
    whole = _zero_padded(weight.flatten(1).t(), (1, chunk_elements(weight.dtype)))
    return whole.clone(memory_format=torch.contiguous_format)


def packed(pack: Callable[[Tensor], Tensor], weights: tuple[Tensor, ...], number: int) -> Tensor:
    """Weights packed one behind the other along k, in chunks, each padded with zeros to whole stages.

    -> (k chunks, columns, elements of a chunk)"""
    if number == TF32:
        weights = tuple(round_to_tf32(weight) for weight in weights)
    parts = [pack(weight) for weight in weights]
    counts = [part.size(0) * part.size(1) for part in parts]
    elements = chunk_elements(weights[0].dtype)
    columns = parts[0][0, 0].numel() // elements
    whole = parts[0].new_empty((sum(padded(count, STAGE_CHUNKS) for count in counts), columns, elements))
    begin = 0
    for part, count in zip(parts, counts, strict=True):
        whole[begin : begin + count].view(part.shape).copy_(part)
        end = begin + padded(count, STAGE_CHUNKS)
        if begin + count < end:
            whole[begin + count : end] = 0
        begin = end
    return whole


def gates_innermost(weight: Tensor) -> Tensor:  # (4 * C, ...) gate-major -> (C * 4, ...)
    return weight.reshape(4, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def gates_outermost(weight: Tensor) -> Tensor:  # (C * 4, ...) -> (4 * C, ...) gate-major
    """The inverse of :func:`gates_innermost`."""
    return weight.reshape(-1, 4, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


@dataclass(frozen=True)
class StepTables:
    """What ``lengths`` and ``reset`` make of a sequence: for each step and image the step its state comes from, and
    the step the gradient of its state comes from, or a StepCode. All computed on the device."""

    source: Tensor  # (T, B) int32
    sink: Tensor  # (T + 1, B) int32, the last row for the initial state
    last: Tensor  # (B,) int64, the last step, or OUTSIDE

    @classmethod
    def of(cls, step_flags: Tensor, reverse: bool) -> StepTables:
        """From the flags (T, B)."""
        steps = step_flags.size(0)
        flags = step_flags.flip(0) if reverse else step_flags  # in the order of the sequence
        valid = (flags & FLAG_PAST_END) == 0
        reset = (flags & FLAG_RESET) != 0
        order = torch.arange(steps, device=flags.device)[:, None]
        # The last valid place up to and including each place, and the first one from each place on.
        up_to = torch.where(valid, order, -1).cummax(0).values
        from_on = torch.where(valid, order, steps).flip(0).cummin(0).values.flip(0)
        before = F.pad(up_to[:-1], (0, 0, 1, 0), value=-1)
        after = F.pad(from_on, (0, 0, 0, 1), value=steps)  # (T + 1, B): row k is the first from k on

        def number(place: Tensor) -> Tensor:  # of a step; what is no place becomes OUTSIDE
            step = steps - 1 - place if reverse else place
            return torch.where((place < 0) | (place >= steps), OUTSIDE, step)

        def by_step(rows: Tensor) -> Tensor:
            return rows.flip(0) if reverse else rows

        source = torch.where(valid, torch.where(reset, NOTHING, number(before)), PAST_END)
        is_reset = F.pad(reset, (0, 0, 0, 1)).gather(0, after)  # of the step after
        after = torch.where(is_reset, NOTHING, number(after))
        sink = torch.cat([by_step(torch.where(valid, after[1:], PAST_END)), after[:1]])
        return cls(by_step(source).int().contiguous(), sink.int().contiguous(), number(up_to[-1]))
