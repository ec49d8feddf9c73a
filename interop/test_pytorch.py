"""swap on the real modules of torchgeo and snnTorch."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from fused_convlstm import swap, unswap

LIBRARY = "torchgeo, snnTorch"
B, T, SIZE, CIN = 2, 4, (6, 7), 3


def torchgeo_conv_lstm() -> type[nn.Module]:
    """The class from its own file: the package as a whole needs torchvision, which has no CPU build everywhere."""
    try:
        files = importlib.metadata.files("torchgeo") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchgeo is not installed")
    path = next(file for file in files if str(file).endswith("models/convlstm.py")).locate()
    spec = importlib.util.spec_from_file_location("torchgeo_convlstm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ConvLSTM


def grads_of(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(outputs, inputs, [torch.randn(x.shape, dtype=x.dtype) for x in outputs]))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("all_layers", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torchgeo(compare, batch_first: bool, all_layers: bool, bias: bool, state: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = [5, 4, 4]
    module = torchgeo_conv_lstm()(CIN, hidden, [(3, 3), (1, 5), (3, 1)], 3, batch_first, bias, all_layers).to(dtype)
    model = nn.ModuleDict({"lstm": copy.deepcopy(module)})
    report = swap(model)
    assert len(report.replaced) == 1, str(report)
    x = torch.randn((B, T, CIN, *SIZE) if batch_first else (T, B, CIN, *SIZE), dtype=dtype)
    states = [tuple(torch.randn(2, B, c, *SIZE, dtype=dtype).unbind()) for c in hidden] if state else None
    results = []
    for lstm in (module, model["lstm"]):
        leaf = x.clone().requires_grad_()
        outputs, finals = lstm(leaf, states)
        tensors = [*outputs, *(tensor for final in finals for tensor in final)]
        weights = list(lstm.parameters())
        results.append((tensors, [type(final) for final in finals], grads_of(tensors, [leaf, *weights])))
    (expected, types, grads), (actual, actual_types, actual_grads) = results
    assert types == actual_types
    for a, e in zip(actual, expected, strict=True):
        compare("output and states", a.detach(), e.detach())
    compare("gradient of the input", actual_grads[0], grads[0])
    # The gradients of the weights, in torchgeo's layout.
    with torch.no_grad():
        for parameter, grad in zip(model["lstm"].parameters(), actual_grads[1:], strict=True):
            parameter.copy_(grad)
    for a, e in zip(unswap(model)["lstm"].parameters(), grads[1:], strict=True):
        compare("gradients of the weights", a.detach(), e)


@pytest.mark.parametrize("reset", ["none", "subtract", "zero"])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_pool": 2}, {"avg_pool": 2}, {"bias": False}, {"learn_threshold": True, "kernel_size": (3, 5)}],
    ids=str,
)
def test_snntorch(compare, reset: str, hidden: bool, options: dict) -> None:
    snntorch = pytest.importorskip("snntorch")
    reset_states = pytest.importorskip("snntorch.utils").reset
    torch.manual_seed(0)

    def net() -> nn.Module:
        settings = {"kernel_size": 3, "threshold": 0.1, "reset_mechanism": reset, "init_hidden": hidden} | options
        return nn.Sequential(snntorch.SConv2dLSTM(CIN, 4, **settings)).double()

    module = net()
    model = net()
    model.load_state_dict(module.state_dict())
    report = swap(model, verify=True)
    assert len(report.replaced) == 1, str(report)
    x = torch.randn(T, B, CIN, *SIZE, dtype=torch.float64)
    for _ in range(2):
        for one in (module, model):
            reset_states(one)
        results = []
        for one in (module, model):
            leaf = x.clone().requires_grad_()
            states = [one[0](frame) for frame in leaf]
            tensors = list(states) if hidden else [tensor for state in states for tensor in state]
            results.append((tensors, grads_of(tensors, [leaf, *one.parameters()])))
        for a, e in zip(results[1][0], results[0][0], strict=True):
            compare("spikes and states", a.detach(), e.detach())
        compare("gradient of the input", results[1][1][0], results[0][1][0])
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), results[1][1][1:], strict=True):
            parameter.copy_(grad)
    for a, e in zip(unswap(model).parameters(), results[0][1][1:], strict=True):
        compare("gradients of the weights", a.detach(), e)
