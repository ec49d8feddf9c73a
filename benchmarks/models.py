"""``python benchmarks/models.py``: whole networks with the fused layers, beside the same networks with the usual loops.

Time and peak memory of a training step (forward, cross-entropy, backward; no optimiser), and the latency of one more
frame of one clip, the state carried. In the peers every ConvLSTM is the loop of ``peers.py`` with the same parameters:
eager, and with its step under torch.compile. Writes ``models-DEVICE.json`` and ``.md`` into ``--results`` as it goes; a
run that was stopped goes on where it was, as long as machine, versions and code are the same. The networks run in
another process, which is ended if one hangs.
"""

from __future__ import annotations

import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from measure import peak_memory_mib
from report import machine
from shapes import Shape
from test_cpu import make_peer
from torch import Tensor, nn

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d
from fused_convlstm.models import StreamingModel, create_model

IMPLEMENTATIONS = ("fused", "eager", "compile")
SECONDS = {"cuda": 180.0, "cpu": 900.0}  # for one network with one implementation


@dataclass(frozen=True)
class Network:
    """A model, and clips of B x T frames of ``size`` x ``size`` pixels for it."""

    name: str
    batch: int
    steps: int
    size: int


# The size of clips is the papers'; the batch that of a GPU, and a small one for CPUs.
NETWORKS = {
    "cuda": (
        Network("resnet_convlstm", 32, 24, 48),
        Network("res3d_convlstm_mobilenet", 16, 32, 112),
        Network("res3d_pooled_gate_mobilenet", 16, 32, 112),
    ),
    "cpu": (
        Network("resnet_convlstm", 2, 24, 48),
        Network("res3d_convlstm_mobilenet", 1, 16, 112),
        Network("res3d_pooled_gate_mobilenet", 1, 16, 112),
    ),
}


class LoopLayer(nn.Module):
    """A peer of one fused layer behind that layer's own signature."""

    def __init__(self, layer: nn.Module, implementation: str) -> None:
        super().__init__()
        pooled = isinstance(layer, PooledGateConvLSTM2d)
        (self.channels,) = layer.hidden_channels
        self.shape = Shape("", 1, 1, layer.in_channels, self.channels, 1, 1, layer.kernel_size[0], layer.stride[0])
        cell = "pooled_gate_conv_lstm2d" if pooled else "conv_lstm2d"
        self.loop = make_peer(cell, self.shape, layer, implementation)

    def forward(
        self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if lengths is not None or reset is not None:
            raise ValueError("lengths, reset: the loops have neither")
        stride = self.shape.stride
        height, width = -(-input.size(3) // stride), -(-input.size(4) // stride)
        zeros = input.new_zeros((input.size(1), self.channels, height, width))
        h, c = (zeros, zeros) if hx is None else (hx[0][0], hx[1][0])
        output, h, c = self.loop(input, h, c)
        return output, (h[None], c[None])


def with_loops(model: StreamingModel, implementation: str) -> StreamingModel:
    """A copy of ``model`` whose fused layers run as loops."""
    model = copy.deepcopy(model)
    for layer in list(model.modules()):
        if isinstance(layer, (ConvLSTM2d, PooledGateConvLSTM2d)):
            loop = LoopLayer(layer, implementation)
            for name, _ in list(layer.named_parameters(recurse=False)):
                delattr(layer, name)
            layer.loop = loop  # its parameters are the layer's now
            layer.forward = loop.forward
    return model


def training_step(model: StreamingModel, frames: Tensor, labels: Tensor, autocast: Any) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast():
            outputs, _ = model(frames)
        loss = F.cross_entropy(outputs.flatten(0, 1).float(), labels.repeat(outputs.size(0)))
        loss.backward()
        return loss.detach()

    return step


def streaming_step(model: StreamingModel, frames: Tensor, autocast: Any) -> Callable[[], Tensor]:
    """One more frame of one clip."""
    with torch.inference_mode(), autocast():
        _, state = model(frames[:1, :1])

    def step() -> Tensor:
        nonlocal state
        with torch.inference_mode(), autocast():
            output, state = model(frames[:1, :1], state)
        return output

    return step


def milliseconds(function: Callable[[], Tensor], device: str, seconds: float = 3.0) -> float:
    """Median over ``seconds``, three runs at least."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 200):
        start = time.perf_counter()
        function()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def peak_mib(function: Callable[[], Tensor], device: str) -> float | None:
    if device == "cpu":
        return peak_memory_mib(function)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    network: Network, implementation: str, device: str, precision: str, expected: float | None
) -> tuple[str, float]:
    """Four columns of the table, and the loss, which has to be ``expected``; runs in a child process."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a step is compiled for every layer's sizes, with gradients and without
    gc.collect()
    torch.manual_seed(0)
    model = create_model(network.name).to(device)
    channels = model.config.in_channels
    frames = torch.randn(network.steps, network.batch, channels, network.size, network.size, device=device)
    labels = torch.randint(model.config.num_classes, (network.batch,), device=device)
    dtype = {"fp32": None, "bf16": torch.bfloat16}[precision]

    def autocast() -> Any:
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    model = model if implementation == "fused" else with_loops(model, implementation)
    model.train()
    step = training_step(model, frames, labels, autocast)
    torch.manual_seed(1)  # the same dropout
    loss = float(step())
    if expected is not None and not abs(loss - expected) <= 1e-3 + (1e-3 if dtype is None else 5e-2) * abs(expected):
        raise RuntimeError(f"the loss is {loss:.6g}, not {expected:.6g}")
    memory = peak_mib(step, device)
    took = milliseconds(step, device)
    latency = ""
    if model.eval().streams:
        stream = streaming_step(model, frames, autocast)
        for _ in range(3):
            stream()
        latency = f"{milliseconds(stream, device):.3g}"
    peak = "" if memory is None else f"{memory:.0f}"
    return f"{took:.4g} | {1e3 * network.batch / took:.3g} | {peak} | {latency}", loss


def save(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n")
    text = [
        ", ".join(f"{key} {value}" for key, value in facts["machine"].items()),
        "",
        "| network | clips | ConvLSTMs | training step ms | clips/s | memory of a step MiB | one frame more ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        *facts["rows"].values(),
    ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def main() -> int:
    parser = gpu.parser(__doc__)
    parser.add_argument("--device", choices=tuple(NETWORKS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--networks", nargs="+", help="names; default: all")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("models: no CUDA device, so nothing was measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    precision = arguments.precision or ("bf16" if device == "cuda" else "fp32")
    about = machine() | ({"device": torch.cuda.get_device_name()} if device == "cuda" else {})
    facts: dict[str, Any] = {
        "machine": about | {"code": gpu.code(), "precision": precision}, "rows": {}, "losses": {}, "failed": []
    }  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"models-{device}.json"
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["machine"] | {"date": ""} == facts["machine"] | {"date": ""}:
            facts = earlier
    with gpu.Child() as child:
        for network in NETWORKS[device]:
            for implementation in IMPLEMENTATIONS:
                what = f"{network.name}, {implementation}"
                if what in facts["rows"] or (arguments.networks and network.name not in arguments.networks):
                    continue
                if time.monotonic() > deadline:
                    print(f"no time left for {what} and what follows; run again to go on")
                    return 1
                try:
                    expected = facts["losses"].get(network.name)
                    result, loss = child.call(
                        SECONDS[device], measure, network, implementation, device, precision, expected
                    )
                    facts["losses"].setdefault(network.name, loss)
                except gpu.ChildError as error:  # a finding; the others are measured all the same
                    reason = str(error)[:100].replace("|", "/")
                    result = f"{reason!r} | | |"
                    facts["failed"].append(what)
                size = f"{network.batch} x {network.steps} x {network.size}x{network.size}"
                facts["rows"][what] = f"| {network.name} | {size} | {implementation} | {result} |"
                print(facts["rows"][what], flush=True)
                save(path, facts)
    return 1 if facts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
