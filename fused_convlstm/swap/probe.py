"""What a cell computes, found by running it: names tell neither the order of the gates nor a missing tanh."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.call import same_padding
from ..convert.layouts import LayerWeights, Layout, read_layer
from ..reference import GATE_ACTIVATIONS, convolution
from .structure import Gates, is_weight, named_tensors

# Far above rounding, far below what another order of the gates makes with the probe's weights. (PyTorch's backward of
# hardsigmoid has a sixth in single precision even for float64.)
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "nothing": lambda x: x,
    "tanh twice": lambda x: torch.tanh(torch.tanh(x)),
    "relu": torch.relu,
    "leaky relu": torch.nn.functional.leaky_relu,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Maths:
    """What a cell computes from its convolutions' outputs."""

    layout: Layout
    gate_activation: str = "sigmoid"
    candidate: str = "tanh"
    output: str = "tanh"  # between the cell state and the output gate

    def refusal(self) -> str | None:
        """Why ConvLSTM2d does not compute this; None if it does."""
        wrong = []
        if self.candidate != "tanh":
            wrong.append(f"its candidate passes through {self.candidate} where a ConvLSTM has tanh")
        if self.output != "tanh":
            wrong.append(f"its cell state passes through {self.output} where a ConvLSTM has tanh")
        return " and ".join(wrong) or None

    def describe(self) -> str:
        text = "gates " + ", ".join(self.layout.gates.replace("c", "g"))
        if len(self.layout.kernels) == 1 and not self.layout.input_first:
            text += ", h before x"
        if self.layout.forget_offset:
            text += f", {self.layout.forget_offset:+g} on f"
        if self.layout.peephole:
            text += ", peepholes"
        return text if self.gate_activation == "sigmoid" else f"{text}, {self.gate_activation}"


class ProbeError(RuntimeError):
    """A module could not be tried out, or what it computes is no ConvLSTM; the message says why."""


@torch.no_grad()
def probe_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of ``module`` in ``dtype`` and evaluation mode with random weights, all of which show in its outputs."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ProbeError("its weights are on the meta device, where it cannot be tried out")
    memo: dict[int, Any] = {}
    for child in module.modules():
        # A state kept from the last call has a history, which cannot be copied.
        for value in (*vars(child).values(), *child.buffers(recurse=False)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        probe = copy.deepcopy(module, memo).to(dtype).eval()
    except Exception as error:
        raise ProbeError(f"it cannot be copied to be tried out: {first_line(error)}") from error
    generator = torch.Generator().manual_seed(0)
    for child in probe.modules():
        for name, value in vars(child).items():
            if isinstance(value, Tensor) and value.dtype.is_floating_point:
                setattr(child, name, value.to(dtype).requires_grad_(value.requires_grad))
    for name, value in named_tensors(probe).items():
        if is_weight(value) and value.dtype.is_floating_point:
            scale = 1.5 * max(value[0].numel(), 1) ** -0.5 if value.dim() == 4 and "weight" in name else 0.7
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu") * scale)
    return probe


def replace_norms(module: nn.Module) -> None:
    """Takes the layers behind gate convolutions out, to see what the rest computes."""
    for child in module.children():
        if isinstance(child, nn.Sequential) and len(child) and isinstance(child[0], nn.Conv2d):
            for k in range(1, len(child)):
                child[k] = nn.Identity()


def random_frames(*shape: int, like: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)


@torch.no_grad()
def identify(
    gates: Gates,
    tensors: dict[str, Tensor],  # of the cell, by the names in gates.layouts
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, Ho, Wo)
    c: Tensor,  # (B, C, Ho, Wo)
    expected: Tensor,  # (B, C, Ho, Wo), the h that the cell made of them
) -> Iterator[Maths]:
    """Every way to compute ``expected`` in one step, the usual ones first.

    From a state of zeros the forget gate does not show: then there are several ways, which later steps tell apart.
    """
    tolerance = TOLERANCE[x.dtype] * max(float(expected.abs().max()), 1.0)
    # The layouts stand in the order i, f, g, o unless names tell another one, so these are the stored blocks.
    orders = ["ifgo"] if gates.order_known else _orders()
    sums = []
    for layout in gates.layouts:
        weights = read_layer(tensors, layout)
        sums.append((layout, weights.peephole, _pre_activations(weights, gates, x, h)))
    ours = itertools.product(("tanh",), ("tanh",), GATE_ACTIVATIONS, (0.0, 1.0))
    others = itertools.product(_ACTIVATIONS, _ACTIVATIONS, ("sigmoid",), (0.0, 1.0))
    for candidate, output, gate, offset in itertools.chain(ours, others):
        for layout, peephole, z in sums:
            for order in orders:
                found = _step(dict(zip(order, z, strict=True)), peephole, c, offset, gate, candidate, output)
                if float((found - expected).abs().max()) <= tolerance:
                    order = layout.gates if gates.order_known else order
                    yield Maths(replace(layout, gates=order, forget_offset=offset), gate, candidate, output)


def _orders() -> list[str]:
    usual = ["ifgo", "ifog", "igfo"]
    return usual + [order for letters in itertools.permutations("ifgo") if (order := "".join(letters)) not in usual]


def _pre_activations(weights: LayerWeights, gates: Gates, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    o = gates.convolution_options()
    recurrent_padding = same_padding((weights.weight_hh.size(2), weights.weight_hh.size(3)), o.recurrent_dilation)
    z = convolution(x, weights.weight_ih, o.padding, o.padding_mode, o.stride, o.dilation)
    z = z + convolution(h, weights.weight_hh, recurrent_padding, o.padding_mode, (1, 1), o.recurrent_dilation)
    return (z if weights.bias is None else z + weights.bias[:, None, None]).chunk(4, dim=1)


def _step(
    z: dict[str, Tensor],  # (B, C, Ho, Wo) each, by the gates' letters
    peephole: Tensor | None,  # (3, C) or (3, C, Ho, Wo)
    c: Tensor,  # (B, C, Ho, Wo)
    offset: float,
    gate: str,
    candidate: str,
    output: str,
) -> Tensor:
    """The cell's equations with other activations: returns h."""
    sigma = GATE_ACTIVATIONS[gate]
    z_i, z_f, z_o = z["i"], z["f"] + offset, z["o"]
    if peephole is not None:
        w_ci, w_cf, w_co = (peephole if peephole.dim() == 4 else peephole[:, :, None, None]).unbind(0)
        z_i, z_f = z_i + w_ci * c, z_f + w_cf * c
    c = sigma(z_f) * c + sigma(z_i) * _ACTIVATIONS[candidate](z["g"])
    if peephole is not None:
        z_o = z_o + w_co * c
    return sigma(z_o) * _ACTIVATIONS[output](c)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
