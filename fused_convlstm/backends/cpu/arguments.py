"""How the extension ``fused_convlstm._cpu`` takes its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

# The numbers of the enumerations in csrc/cpu.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
GATE_ACTIVATIONS = {"sigmoid": 0, "hard_sigmoid": 1, "hard_sigmoid_keras2": 2}
PADDING_MODES = {"zeros": 0, "circular": 1, "replicate": 2, "reflect": 3}


def view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """A tensor's address and strides."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride())


def views(*tensors: Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(map(view, tensors))
