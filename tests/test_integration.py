"""The operators inside PyTorch's machinery: opcheck, autocast, torch.compile, torch.export, DDP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Case, case_id, in_layout, make_tensors
from torch import Tensor
from torch.autograd import forward_ad

from fused_convlstm import BackendError, ConvLSTM2d, PooledGateConvLSTM2d, explain, ops, use_backend
from fused_convlstm import functional as FC
from fused_convlstm.backends.call import SAVE_CELLS, SAVE_GATES, SAVE_NOTHING
from fused_convlstm.ops._sequence import flatten_options

LAYERS = [ConvLSTM2d, PooledGateConvLSTM2d]
BACKENDS = ["reference", "cpu"]


@pytest.mark.parametrize("save", [SAVE_NOTHING, SAVE_CELLS, SAVE_GATES])
@pytest.mark.parametrize(
    "case",
    [
        Case(cell=cell, **options)
        for cell in ("conv_lstm2d", "pooled_gate_conv_lstm2d")
        for options in (
            {},
            {"layout": "channels_last", "stride": (2, 2)},
            {"layout": "batch_major", "lengths": True, "reset": True, "state": False, "bias": False},
        )
    ],
    ids=case_id,
)
def test_opcheck(case: Case, save: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch agree with what the operator does."""
    tensors = make_tensors(case).to(torch.float32)
    input = in_layout(tensors.input.nan_to_num(), case.layout)
    flags = FC.make_step_flags(input, tensors.lengths, tensors.reset)
    w = tensors.weights
    if case.cell == "conv_lstm2d":
        weights = [w["weight_ih"], w["weight_hh"], w["bias"], None]
        options = FC.make_options((weights[0], "weight_ih"), case.stride, "same", 1, None, 1, "zeros", "sigmoid", False)
    else:
        weights = [w[name] for name in FC.POOLED_GATE_WEIGHTS]
        options = FC.make_options((weights[3], "weight"), case.stride, "same", 1, None, 1, "zeros", "sigmoid", False)
    if save != SAVE_NOTHING:
        input.requires_grad_()
        weights = [None if weight is None else weight.requires_grad_() for weight in weights]
    h_0, c_0 = tensors.hx or (None, None)
    torch.library.opcheck(
        getattr(ops, case.cell), (input, h_0, c_0, *weights, flags, *flatten_options(options), save, "cpu")
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: Any, backend: str) -> None:
    lstm = layer(3, 5, 3, backend=backend)
    x = torch.randn(4, 2, 3, 8, 7)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = lstm(x)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lstm.parameters())
    torch.testing.assert_close(output.float(), lstm(x)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_compile_fullgraph(layer: Any, backend: str) -> None:
    lstm = layer(3, 5, 3, bidirectional=True, backend=backend)
    x = torch.randn(3, 2, 3, 8, 7)
    lengths = torch.tensor([3, 2])
    expected, (h_n, _) = lstm(x, lengths=lengths)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in lstm.parameters()]
    lstm.zero_grad()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    output, (h_compiled, _) = compiled(x, lengths=lengths)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_compiled, h_n)
    for parameter, grad in zip(lstm.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_where_none_were_wanted_at_first(layer: Any) -> None:
    """What a forward pass keeps was decided under no_grad, or for frozen weights."""
    lstm = layer(3, 5, 3, backend="cpu")
    x = torch.randn(3, 2, 3, 8, 7)
    lstm(x)[0].square().sum().backward()
    with torch.no_grad():
        program = torch.export.export(lstm, (x,)).module()
    program(x)[0].square().sum().backward()
    for name, parameter in program.named_parameters():
        torch.testing.assert_close(parameter.grad, lstm.get_parameter(name).grad)

    lstm.requires_grad_(False)
    batch = torch.randn(4, 3, 2, 3, 8, 7, requires_grad=True)
    (expected,) = torch.autograd.grad(sum(lstm(one)[0].square().sum() for one in batch), batch)
    (actual,) = torch.autograd.grad(torch.vmap(lambda one: lstm(one)[0])(batch).square().sum(), batch)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_saved_tensors_with_other_strides(layer: Any) -> None:
    lstm = layer(3, 5, 3, backend="cpu")
    x = torch.randn(3, 2, 3, 8, 7)
    grads = []
    for unpack in (lambda tensor: tensor, lambda tensor: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            grads.append(torch.autograd.grad(lstm(x)[0].square().sum(), list(lstm.parameters())))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_transforms_of_torch_func(layer: Any) -> None:
    """The reference serves them; a backend asked for by name says that it cannot."""
    lstm = layer(2, 3, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    tangent = torch.randn_like(x)
    with torch.no_grad():
        step = 1e-6
        expected = (lstm(x + step * tangent)[0] - lstm(x - step * tangent)[0]) / (2 * step)
    _, actual = torch.func.jvp(lambda y: lstm(y)[0], (x,), (tangent,))
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-5)
    lstm.requires_grad_(False)
    with forward_ad.dual_level():
        actual = forward_ad.unpack_dual(lstm(forward_ad.make_dual(x, tangent))[0]).tangent
    torch.testing.assert_close(actual, expected, atol=1e-8, rtol=1e-5)

    gradient = torch.func.grad(lambda y: lstm(y)[0].square().sum())
    y = x.clone().requires_grad_()
    torch.testing.assert_close(gradient(x), torch.autograd.grad(lstm(y)[0].square().sum(), y)[0])
    assert set(explain(gradient, x).backends) == {"reference"}
    lstm.backend = "cpu"
    with pytest.raises(BackendError, match=r"cannot serve .*torch.func.grad, vjp and jvp"):
        gradient(x)


def test_compile_as_the_first_use_in_a_process(tmp_path: Path) -> None:
    script = (
        "import torch; from fused_convlstm import ConvLSTM2d\n"
        "compiled = torch.compile(ConvLSTM2d(1, 2, 3), fullgraph=True, backend='eager')\n"
        "print(compiled(torch.ones(2, 1, 1, 3, 3))[0].shape)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_compile_with_inductor_and_dynamic_sizes() -> None:
    lstm = ConvLSTM2d(3, 5, 3, backend="cpu")
    compiled = torch.compile(lstm, fullgraph=True, dynamic=True)
    for steps, batch, height in ((3, 2, 8), (5, 3, 9), (7, 4, 6)):
        x = torch.randn(steps, batch, 3, height, 7)
        torch.testing.assert_close(compiled(x)[0], lstm(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_export(layer: Any, backend: str) -> None:
    lstm = layer(3, 5, 3, backend=backend).eval()
    x = torch.randn(3, 2, 3, 8, 7)
    _, state = lstm(x)
    program = torch.export.export(lstm, (x, state))
    y = torch.randn(3, 2, 3, 8, 7)
    output, (h_n, c_n) = program.module()(y, state)
    expected, (h_expected, c_expected) = lstm(y, state)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, h_expected)
    torch.testing.assert_close(c_n, c_expected)


def _ddp_worker(rank: int, world: int, folder: str, x: Tensor) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    lstm = torch.nn.parallel.DistributedDataParallel(ConvLSTM2d(3, 5, 3, backend="cpu"))
    lstm(x[:, rank::world])[0].square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in lstm.parameters()], f"{folder}/gradients.pt")
    dist.barrier()  # a process that left early could keep the other waiting
    dist.destroy_process_group()


def test_ddp(tmp_path: Any) -> None:
    """Two processes with half the batch each give the gradients of one."""
    x = torch.randn(4, 4, 3, 8, 7)
    torch.manual_seed(0)
    lstm = ConvLSTM2d(3, 5, 3, backend="cpu")
    lstm(x)[0].square().mean().backward()
    mp.spawn(_ddp_worker, (2, str(tmp_path), x), nprocs=2)
    gradients = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for actual, parameter in zip(gradients, lstm.parameters(), strict=True):
        torch.testing.assert_close(actual, parameter.grad)


def test_inference_mode_and_no_grad_keep_nothing() -> None:
    """Without gradients, nothing is kept for backward."""
    lstm = ConvLSTM2d(3, 5, 3, backend="cpu")
    x = torch.randn(3, 2, 3, 8, 7)
    with torch.inference_mode():
        inference, _ = lstm(x)
    with torch.no_grad():
        no_grad, _ = lstm(x)
    assert no_grad.grad_fn is None
    torch.testing.assert_close(inference, no_grad, rtol=0, atol=0)
    with use_backend("reference"):
        torch.testing.assert_close(ConvLSTM2d.forward(lstm, x)[0], no_grad)


@pytest.mark.parametrize("layer", LAYERS)
def test_meta_device(layer: Any) -> None:
    """Shapes without memory or arithmetic, as for counting operations."""
    module = layer(3, 4, 3, device="meta")
    output, (h_n, c_n) = module(torch.empty(2, 5, 3, 6, 7, device="meta"))
    assert output.shape == (2, 5, 4, 6, 7)
    assert h_n.shape == c_n.shape == (1, 5, 4, 6, 7)
