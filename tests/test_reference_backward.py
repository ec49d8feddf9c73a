"""Autograd through the reference against a backward derived by hand, in float64.

The derivation here is the one that the kernels implement: one pass a step from the last to the first, then the weight
gradients as sums over time.
"""

import pytest
import torch
import torch.nn.functional as F
from cases import Case, case_id, make_tensors, run
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def backward_by_hand(case: Case) -> dict[str, Tensor]:
    """Gradients of a ConvLSTM sequence with odd square kernels, zero padding, stride 1, sigmoid gates."""
    t = make_tensors(case)
    w_x, w_h, bias = t.weights["weight_ih"], t.weights["weight_hh"], t.weights["bias"]
    peephole = t.weights.get("peephole")
    p_i, p_f, p_o = torch.zeros(3, 1, 1, 1) if peephole is None else peephole[:, :, None, None]
    pad_x, pad_h = case.kernel_size[0] // 2, case.recurrent_kernel_size[0] // 2
    reset = torch.zeros(case.steps, case.batch, dtype=torch.bool) if t.reset is None else t.reset
    keep = (~reset)[:, :, None, None, None].double()

    # Forward, keeping what the backward needs. h and c enter a step already multiplied by `keep`.
    h, c = t.hx
    kept = []
    for step in range(case.steps):
        h, c = keep[step] * h, keep[step] * c
        z = F.conv2d(t.input[step], w_x, bias, padding=pad_x) + F.conv2d(h, w_h, padding=pad_h)
        z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
        i, f, g = torch.sigmoid(z_i + p_i * c), torch.sigmoid(z_f + p_f * c), torch.tanh(z_g)
        c_new = f * c + i * g
        o = torch.sigmoid(z_o + p_o * c_new)
        kept.append((h, c, i, f, g, o, c_new))
        h, c = o * torch.tanh(c_new), c_new

    grads = {name: torch.zeros_like(w) for name, w in t.weights.items() if w is not None}
    grad_input = torch.empty_like(t.input)
    grad_output, dh, dc = t.grads[0], t.grads[1], t.grads[2]
    for step in reversed(range(case.steps)):
        h, c, i, f, g, o, c_new = kept[step]
        dh = dh + grad_output[step]
        tanh_c = torch.tanh(c_new)
        dz_o = dh * tanh_c * o * (1 - o)
        dc = dc + dh * o * (1 - tanh_c**2) + dz_o * p_o
        dz_i, dz_f, dz_g = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2)
        dz = torch.cat((dz_i, dz_f, dz_g, dz_o), dim=1)
        grads["weight_ih"] += conv2d_weight(t.input[step], w_x.shape, dz, padding=pad_x)
        grads["weight_hh"] += conv2d_weight(h, w_h.shape, dz, padding=pad_h)
        grads["bias"] += dz.sum((0, 2, 3))
        if peephole is not None:
            grads["peephole"] += torch.stack([(dz_i * c).sum((0, 2, 3)), (dz_f * c).sum((0, 2, 3)),
                                              (dz_o * c_new).sum((0, 2, 3))])  # fmt: skip
        grad_input[step] = conv2d_input(t.input[step].shape, w_x, dz, padding=pad_x)
        dh = keep[step] * conv2d_input(h.shape, w_h, dz, padding=pad_h)
        dc = keep[step] * (dc * f + dz_i * p_i + dz_f * p_f)
    return {
        "grad_input": grad_input,
        "grad_h_0": dh,
        "grad_c_0": dc,
        **{f"grad_{name}": grad for name, grad in grads.items()},
    }


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=4),
        Case(steps=4, kernel_size=(5, 5), recurrent_kernel_size=(1, 1)),
        Case(steps=5, batch=3, reset=True),
        Case(steps=4, peephole="channel"),
        Case(steps=5, batch=3, peephole="channel", reset=True),
    ],
    ids=case_id,
)
def test_autograd_equals_the_derivation(case: Case) -> None:
    expected = backward_by_hand(case)
    actual = run(case, make_tensors(case), "reference")
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("cell", ["conv_lstm2d", "pooled_gate_conv_lstm2d"])
def test_gradcheck_twice(cell: str) -> None:
    """The reference is right to second order: gradients of gradients work through it."""
    case = Case(cell=cell, steps=2, batch=1, in_channels=1, hidden_channels=2, size=(3, 2))
    tensors = make_tensors(case)
    names = list(tensors.weights)

    def function(input: Tensor, *weights: Tensor) -> Tensor:
        changed = make_tensors(case)
        changed.weights = dict(zip(names, weights, strict=True))
        from fused_convlstm import functional as FC

        output, (h_n, c_n) = getattr(FC, cell)(
            input, hx=changed.hx, backend="reference", **changed.weights, **case.options()
        )
        return torch.cat((output.flatten(), h_n.flatten(), c_n.flatten()))

    leaves = [x.clone().requires_grad_() for x in (tensors.input, *tensors.weights.values())]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
