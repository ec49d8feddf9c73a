"""Initialisation of gate weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def glorot_per_gate_(weight: Tensor, gates: int) -> None:
    """Glorot-uniform, each gate's block on its own; any number of dimensions from 2."""
    for block in weight.chunk(gates):
        nn.init.xavier_uniform_(block)


@torch.no_grad()
def orthogonal_per_gate_(weight: Tensor, gates: int) -> None:
    """Orthogonal over (out, everything else), each gate's block on its own."""
    for block in weight.chunk(gates):
        # In single precision at least: the QR decomposition behind it knows no half.
        dtype = torch.promote_types(block.dtype, torch.float32)
        block.copy_(nn.init.orthogonal_(torch.empty(block.shape, dtype=dtype, device=block.device)))


@torch.no_grad()
def forget_gate_bias_(bias: Tensor, gates: int) -> None:
    """Zero, but one for the forget gate, which stands second (Jozefowicz et al. 2015)."""
    bias.zero_()
    bias.chunk(gates)[1].fill_(1.0)
