"""tf32, the matrix units' arithmetic for float32: whether it may be used, and what its operands are."""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import constant


@constant
def tf32_allowed() -> bool:
    """Whether PyTorch may use tf32 for its own convolutions."""
    convolution = getattr(torch.backends.cudnn, "conv", None)
    if convolution is not None and hasattr(convolution, "fp32_precision"):  # torch 2.9 and later
        return bool(convolution.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


def round_to_tf32(weight: Tensor) -> Tensor:
    """float32 weights rounded to the 10-bit mantissa of tf32, ties away from zero like the hardware's conversion; the
    matrix instructions by themselves cut bits off, all in one direction."""
    rounded = ((weight.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(weight.isnan(), weight, rounded)  # a GPU's NaN has all bits set: the sum would be -0
