"""The CPU kernels beside their strongest peers."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import matmul_gflops, peak_memory_mib
from peers import LoopConvLSTM, PlainPooledGate, channels_last, copy_weights
from report import WINOGRAD, Measurement
from shapes import POOLED_GATE_SHAPES, SHAPES, Shape
from torch import Tensor, nn

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d, explain, use_winograd

TASKS = {
    "inference float32": torch.float32,
    "inference bfloat16": torch.bfloat16,
    "training float32": torch.float32,
    "training bfloat16": torch.bfloat16,
}
PEERS = ("eager", "channels_last", "compile")
CASES = [("conv_lstm2d", shape) for shape in SHAPES] + [("pooled_gate_conv_lstm2d", s) for s in POOLED_GATE_SHAPES]


def make_fused(cell: str, shape: Shape, dtype: torch.dtype, recompute: bool) -> nn.Module:
    torch.manual_seed(0)
    layer = ConvLSTM2d if cell == "conv_lstm2d" else PooledGateConvLSTM2d
    return layer(
        shape.in_channels,
        shape.hidden_channels,
        shape.kernel,
        stride=shape.stride,
        recompute_gates=recompute,
        dtype=dtype,
    )


def make_peer(cell: str, shape: Shape, fused: nn.Module, name: str) -> nn.Module:
    """A peer with the parameters of ``fused``."""
    if cell == "conv_lstm2d":
        peer: Any = LoopConvLSTM(shape.in_channels, shape.hidden_channels, shape.kernel, shape.stride)
        peer.to(fused.weight_ih_l0.dtype)
        copy_weights(peer, fused)
    else:
        peer = PlainPooledGate(copy.deepcopy(fused), shape.kernel)
    if name == "channels_last":
        peer.to(memory_format=torch.channels_last)
    if name == "compile":
        peer.step = torch.compile(peer.step, dynamic=False)
    return peer


def make_input(shape: Shape, dtype: torch.dtype, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (shape.steps, shape.batch, shape.in_channels, shape.height, shape.width)
    input = torch.randn(size, generator=generator).to(dtype).requires_grad_(training)
    state = torch.zeros(shape.batch, shape.hidden_channels, *shape.state_size, dtype=dtype)
    return input, state, state.clone()


def forward(module: nn.Module, input: Tensor, h: Tensor, c: Tensor) -> Tensor:
    if isinstance(module, (ConvLSTM2d, PooledGateConvLSTM2d)):
        return module(input, (h[None], c[None]))[0]
    return module(input, h, c)[0]


def make_runner(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], training: bool) -> Callable[[], Tensor]:
    """A forward pass, or a whole training step without the optimiser; returns the output."""
    input, h, c = inputs

    def inference() -> Tensor:
        with torch.inference_mode():
            return forward(module, input, h, c)

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        input.grad = None
        output = forward(module, input, h, c)
        output.backward(torch.ones_like(output))
        return output.detach()

    return step if training else inference


# The topmost varies fastest: what is compared runs one after the other.
@pytest.mark.parametrize("name", ["fused", *WINOGRAD, "fused, gates recomputed", *PEERS])
@pytest.mark.parametrize(("cell", "shape"), CASES, ids=[f"{cell}-{shape.name}" for cell, shape in CASES])
@pytest.mark.parametrize("task", TASKS)
def test_cpu(name: str, cell: str, shape: Shape, task: str, benchmark: Any, record: list[Measurement]) -> None:
    training, dtype = task.startswith("training"), TASKS[task]
    if name == "fused, gates recomputed" and not training:
        pytest.skip("only training keeps gates")
    if name in WINOGRAD and not (cell == "conv_lstm2d" and dtype == torch.float32 and shape.kernel == 3):
        pytest.skip("only for 3x3 kernels in float32")
    torch._dynamo.reset()
    fused = make_fused(cell, shape, dtype, name == "fused, gates recomputed")
    inputs = make_input(shape, dtype, training)
    module = fused if name.startswith("fused") else make_peer(cell, shape, fused, name)
    if name == "channels_last":
        inputs = (channels_last(inputs[0].detach()).requires_grad_(training), *map(channels_last, inputs[1:]))
    runner = make_runner(module, inputs, training)
    expected = forward(fused, *make_input(shape, dtype, False)).detach()
    with use_winograd("auto", WINOGRAD[name]) if name in WINOGRAD else use_winograd("never"):
        torch.testing.assert_close(runner(), expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.01)
        backend = explain(runner).backends[0] if name.startswith("fused") else None
        peak = peak_memory_mib(runner) if training else None
        rounds = max(5, min(200, int(1.5 / _seconds(runner))))
        benchmark.group = f"{cell} {task} {shape.name}"
        benchmark.pedantic(runner, rounds=rounds, warmup_rounds=1)
    times = sorted(1000 * t for t in benchmark.stats.stats.data)
    flops = shape.flops if cell == "conv_lstm2d" else shape.pooled_gate_flops
    record.append(
        Measurement(
            cell=cell,
            task=task,
            shape=shape.name,
            implementation=name,
            median_ms=statistics.median(times),
            p20_ms=times[len(times) // 5],
            p80_ms=times[len(times) * 4 // 5],
            rounds=rounds,
            flops=3 * flops if training else flops,
            peak_gflops=matmul_gflops(dtype),
            peak_memory_mib=peak,
            backend=backend,
        )
    )


def _seconds(runner: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    runner()
    return time.perf_counter() - start
