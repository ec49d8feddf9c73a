"""What happens around the kernels through PyTorch: frames to NHWC, padding, time chunks, neighbouring steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import FLAG_PAST_END, FLAG_RESET, ConvLSTMOptions

# A buffer 4 * C wide spans as many steps as fit in this many bytes, or in a sixteenth of its full size if that is more.
CHUNK_BYTES = 64 << 20
FLAT_CHANNELS = 16  # with fewer input channels, kernels read x as it lies


def chunk_steps(steps: int, frame_bytes: int) -> int:
    """Steps of a time chunk."""
    return max(1, min(steps, max(CHUNK_BYTES // max(1, frame_bytes), steps // 16)))


def chunks(steps: int, length: int, backward: bool = False) -> Iterator[tuple[int, int]]:
    """[begin, end) of the time chunks, in the order of time or against it; the shorter one is the last in time."""
    begins = range(0, steps, length)
    for begin in reversed(begins) if backward else begins:
        yield begin, min(begin + length, steps)


def frames_of(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:  # (B, C, H, W) -> (1, B, H, W, C)
    """A state as one contiguous NHWC frame."""
    return None if state is None else nhwc(state).to(dtype).contiguous()[None]


def nhwc(x: Tensor) -> Tensor:  # (..., C, H, W) -> (..., H, W, C)
    """A view with the channels last."""
    return x.movedim(-3, -1)


def nchw(x: Tensor) -> Tensor:  # (..., H, W, C) -> (..., C, H, W)
    """A view with the channels first."""
    return x.movedim(-1, -3)


def frames_nchw(frames: Tensor) -> Tensor:  # (n, B, C, H, W) -> (n * B, C, H, W) in channels_last memory
    """The frames as a batch for PyTorch's convolutions; copied only if they lie otherwise."""
    return nchw(nhwc(frames).contiguous().flatten(0, 1))


def pad_frames(
    frames: Tensor,  # (N, C, H, W)
    padding: tuple[int, int, int, int],  # top, bottom, left, right
    padding_mode: str,
) -> tuple[Tensor, tuple[int, int]]:
    """Frames and the symmetric zero padding that is left for the convolution to do."""
    top, bottom, left, right = padding
    if padding_mode == "zeros" and top == bottom and left == right:
        return frames, (top, left)
    if any(padding):
        mode = "constant" if padding_mode == "zeros" else padding_mode
        frames = F.pad(frames, (left, right, top, bottom), mode).contiguous(memory_format=torch.channels_last)
    return frames, (0, 0)


def unpad_gradient(
    grad: Tensor,  # (N, C, H + padding, W + padding)
    size: tuple[int, int],  # (H, W)
    padding: tuple[int, int, int, int],
    padding_mode: str,
) -> Tensor:  # (N, C, H, W)
    """The gradient of the frames from that of the padded frames. Sums by matrix products: PyTorch's own backward of
    padding adds atomically on GPUs, in no fixed order."""
    if grad.shape[2:] == size:
        return grad
    top, bottom, left, right = padding
    if padding_mode == "zeros":
        return grad[:, :, top : top + size[0], left : left + size[1]]
    rows = _fold_matrix(size[0], top, bottom, padding_mode, grad)
    columns = _fold_matrix(size[1], left, right, padding_mode, grad)
    return torch.einsum("hp,ncpq,wq->nchw", rows, grad, columns)


def _fold_matrix(size: int, before: int, after: int, mode: str, like: Tensor) -> Tensor:  # (size, padded size)
    """1 where a padded position was read from a position."""
    position = torch.arange(size, dtype=torch.float32, device=like.device)
    source = F.pad(position[None, None], (before, after), mode)[0, 0]
    return (source == position[:, None]).to(like.dtype)


def input_frames(
    input: Tensor,  # (T, B, Cin, H, W)
    options: ConvLSTMOptions,
    chunk: int,
) -> Iterator[tuple[int, int, Tensor, tuple[int, int]]]:
    """Time chunks in the order of computation: begin, end, the frames (n, B, Cin, H, W) as a kernel reads them
    (channels innermost, or few of them), and the zero padding that is left to do. Copied only if they have to be."""
    steps, batch = input.size(0), input.size(1)
    zeros = options.padding_mode == "zeros"
    left = (options.padding[0], options.padding[2])
    if zeros and (input.size(2) < FLAT_CHANNELS or input.stride(2) == 1):
        yield 0, steps, input, left
        return
    for begin, end in chunks(steps, chunk, options.reverse):
        frames, padding = frames_nchw(input[begin:end]), left
        if not zeros:
            frames, padding = pad_frames(frames, options.padding, options.padding_mode)
        yield begin, end, frames.unflatten(0, (end - begin, batch)), padding


def previous_frames(
    frames: Tensor,  # (T, B, H, W, C): the state after each step
    initial: Tensor | None,  # (1, B, H, W, C), or zeros
    step_flags: Tensor | None,  # (T, B)
    begin: int,
    end: int,
    reverse: bool,
) -> Tensor:  # (end - begin, B, H, W, C), contiguous
    """The state before each of the steps [begin, end): that of the step before, zero where it was reset.

    Copied only if it has to be."""
    steps = frames.size(0)
    before = slice(begin + 1, end + 1) if reverse else slice(begin - 1, end - 1)
    first = steps - 1 if reverse else 0  # the step that starts from the initial state
    if step_flags is None and not begin <= first < end:
        return frames[before].contiguous()
    count = end - begin
    result = frames.new_empty((count, *frames.shape[1:]))
    if begin <= first < end:
        inner = slice(0, count - 1) if reverse else slice(1, count)
        before = slice(begin + 1, end) if reverse else slice(begin, end - 1)
        result[inner] = frames[before]
        edge = result[first - begin]
        edge.zero_() if initial is None else edge.copy_(initial[0])
    else:
        inner = slice(0, count)
        result.copy_(frames[before])
    if step_flags is not None:
        # Before the first valid step of a reversed sequence lies what is past its end: there the output is zero, the
        # state the initial one.
        if initial is not None:
            past_end = (step_flags[before] & FLAG_PAST_END).bool()[:, :, None, None, None]
            result[inner] = torch.where(past_end, initial, result[inner])
        result.masked_fill_((step_flags[begin:end] & FLAG_RESET).bool()[:, :, None, None, None], 0)
    return result


def masked_frames(input: Tensor, step_flags: Tensor | None, begin: int, end: int) -> Tensor:
    """Input frames [begin, end), zero past the end of their sequences: there may be NaN."""
    frames = input[begin:end]
    if step_flags is None:
        return frames
    return frames.masked_fill((step_flags[begin:end] & FLAG_PAST_END).bool()[:, :, None, None, None], 0)


def convolution_backward(
    grad: Tensor,  # (N, K, Ho, Wo)
    frames: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (K, C / groups, kh, kw)
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    need_frames: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the frames and of the weight of a convolution, the same bits in every run; undefined where not
    needed."""
    if grad.device.type == "cpu":  # the interpreter: oneDNN's channels-last backward is the less exact one
        grad, frames = grad.contiguous(), frames.contiguous()
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # else cuDNN may add atomically
    try:
        d_frames, d_weight, _ = torch.ops.aten.convolution_backward(
            grad, frames, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (need_frames, need_weight, False),
        )  # fmt: skip
    finally:
        torch.backends.cudnn.deterministic = deterministic
    return d_frames, d_weight


class Sum:
    """A gradient summed over time chunks, in float32, in the order in which they come."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        if self.total is None:
            self.total = part.float()
        else:
            self.total += part

    def write(self, gradient: Tensor) -> Tensor:
        assert self.total is not None
        return gradient.copy_(self.total.view(gradient.shape))
