"""Test cases for sequence kernels: one description, random tensors from a seed, every backend and dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_convlstm import functional as FC


@dataclass(frozen=True)
class Case:
    """A sequence call. Sizes are kept small; ``layout`` is the memory layout of the input."""

    cell: str = "conv_lstm2d"  # or "pooled_gate_conv_lstm2d"
    steps: int = 3
    batch: int = 2
    in_channels: int = 3
    hidden_channels: int = 5
    size: tuple[int, int] = (7, 6)
    kernel_size: tuple[int, int] = (3, 3)
    recurrent_kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: object = "same"
    dilation: tuple[int, int] = (1, 1)
    recurrent_dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    gate_activation: str = "sigmoid"
    reverse: bool = False
    bias: bool = True
    peephole: str = "none"
    state: bool = True
    lengths: bool = False
    reset: bool = False
    layout: str = "contiguous"  # "channels_last", "batch_major", "sliced", "expanded"
    recompute_gates: bool = False
    seed: int = 0

    def options(self) -> dict[str, object]:
        names = ["stride", "padding", "dilation", "recurrent_dilation", "padding_mode", "gate_activation", "reverse",
                 "recompute_gates"]  # fmt: skip
        if self.cell == "conv_lstm2d":
            names.append("groups")
        return {name: getattr(self, name) for name in names}

    def state_size(self) -> tuple[int, int]:
        padding = FC.resolve_padding(self.padding, self.kernel_size, self.dilation)  # type: ignore[arg-type]
        return FC.conv_output_size(self.size, self.kernel_size, self.stride, padding, self.dilation)


def in_layout(frames: Tensor, layout: str) -> Tensor:
    """``frames`` (T, B, C, H, W) with the same values and other strides."""
    if layout == "channels_last":
        return frames.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "batch_major":
        return frames.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":  # a window of a larger buffer: no stride is a product of sizes
        t, b, c, h, w = frames.shape
        buffer = torch.full((t + 1, b + 2, c + 1, h + 3, w + 2), float("nan"), dtype=frames.dtype, device=frames.device)
        view = buffer[1:, 1 : b + 1, :c, 2 : h + 2, 1 : w + 1]
        view.copy_(frames)
        return view
    if layout == "expanded" and torch.equal(frames, frames[:1].expand_as(frames)):  # else some are NaN past the end
        return frames[:1].expand_as(frames)
    return frames


@dataclass
class Tensors:
    """The tensors of a case; ``weights`` by the name of the functional's argument."""

    input: Tensor
    hx: tuple[Tensor, Tensor] | None
    weights: dict[str, Tensor | None]
    lengths: Tensor | None
    reset: Tensor | None
    grads: tuple[Tensor, Tensor, Tensor]  # of output, h_n, c_n

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensors:
        def convert(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(device=device, dtype=dtype)

        return Tensors(
            convert(self.input),
            None if self.hx is None else tuple(map(convert, self.hx)),
            {name: convert(weight) for name, weight in self.weights.items()},
            self.lengths,
            None if self.reset is None else self.reset.to(device),
            tuple(map(convert, self.grads)),
        )  # type: ignore[arg-type]

    def part(
        self, begin: int, end: int, samples: slice = slice(None), hx: tuple[Tensor, Tensor] | None = None
    ) -> Tensors:
        """Steps ``begin`` to ``end`` of some samples, from another initial state if ``hx`` is given."""
        if hx is None and self.hx is not None:
            hx = (self.hx[0][samples], self.hx[1][samples])
        return replace(
            self,
            input=self.input[begin:end, samples],
            hx=hx,
            lengths=None if self.lengths is None else (self.lengths[samples] - begin).clamp(0, end - begin),
            reset=None if self.reset is None else self.reset[begin:end, samples],
        )


def make_tensors(case: Case) -> Tensors:
    """Float64 tensors of the case, exactly representable in float16 and bfloat16, so that every precision is judged
    on the same numbers."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        return x.to(torch.bfloat16).to(torch.float64)

    t, b, ci, c = case.steps, case.batch, case.in_channels, case.hidden_channels
    ho, wo = case.state_size()
    if case.cell == "conv_lstm2d":
        n = case.groups
        fan = (ci * case.kernel_size[0] * case.kernel_size[1] + c * case.recurrent_kernel_size[0]) / n
        weights: dict[str, Tensor | None] = {
            "weight_ih": normal(4 * c, ci // n, *case.kernel_size, scale=fan**-0.5),
            "weight_hh": normal(4 * c, c // n, *case.recurrent_kernel_size, scale=fan**-0.5),
            "bias": normal(4 * c) if case.bias else None,
        }
        if case.peephole == "channel":
            weights["peephole"] = normal(3, c, scale=0.5)
        elif case.peephole == "pixel":
            weights["peephole"] = normal(3, c, ho, wo, scale=0.5)
    else:
        weights = {
            "gate_weight_ih": normal(3 * c, ci),
            "gate_weight_hh": normal(3 * c, c, scale=c**-0.5),
            "depthwise_ih": normal(ci, 1, *case.kernel_size),
            "depthwise_hh": normal(c, 1, *case.recurrent_kernel_size),
            "pointwise_ih": normal(c, ci, scale=ci**-0.5),
            "pointwise_hh": normal(c, c, scale=c**-0.5),
            "gate_bias": normal(3 * c) if case.bias else None,
            "bias": normal(c) if case.bias else None,
        }
    frames = normal(1 if case.layout == "expanded" else t, b, ci, *case.size).expand(t, b, ci, *case.size)
    lengths = torch.randint(0, t + 1, (b,), generator=g) if case.lengths else None
    if lengths is not None:  # whatever stands past the end must have no influence
        past = torch.arange(t)[:, None] >= lengths
        frames = frames.masked_fill(past[:, :, None, None, None], float("nan"))
    return Tensors(
        frames,
        (normal(b, c, ho, wo, scale=0.5), normal(b, c, ho, wo)) if case.state else None,
        weights,
        lengths,
        torch.rand((t, b), generator=g) < 0.4 if case.reset else None,
        (normal(t, b, c, ho, wo), normal(b, c, ho, wo), normal(b, c, ho, wo)),
    )


def run(case: Case, tensors: Tensors, backend: str, training: bool = True) -> dict[str, Tensor]:
    """Outputs and, if training, every gradient, by name."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().requires_grad_(training)

    input = in_layout(tensors.input, case.layout).detach().requires_grad_(training)
    hx = None if tensors.hx is None else (leaf(tensors.hx[0]), leaf(tensors.hx[1]))
    weights = {name: leaf(weight) for name, weight in tensors.weights.items()}
    function = getattr(FC, case.cell)
    with torch.set_grad_enabled(training):
        output, (h_n, c_n) = function(
            input, hx=hx, lengths=tensors.lengths, reset=tensors.reset, backend=backend, **weights, **case.options()
        )
    results = {"output": output, "h_n": h_n, "c_n": c_n}
    if not training:
        return results
    grad_output, grad_h_n, grad_c_n = tensors.grads
    leaves = {"input": input, **weights}
    if hx is not None:
        leaves |= {"h_0": hx[0], "c_0": hx[1]}
    leaves = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    grads = torch.autograd.grad(
        (output, h_n, c_n), list(leaves.values()), (grad_output, grad_h_n, grad_c_n.to(c_n.dtype))
    )
    results = {name: value.detach() for name, value in results.items()}
    return results | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def ordinary(cell: str) -> list[Case]:
    """A case for each option on its own and for the combinations most likely to break, all with odd sizes."""
    base = Case(cell=cell)
    cases = [
        base,
        replace(base, steps=1, batch=1, in_channels=1, hidden_channels=1, size=(1, 1)),
        replace(base, batch=0),
        replace(base, size=(1, 9)),
        replace(base, size=(9, 1)),
        replace(base, size=(2, 2), kernel_size=(5, 5), recurrent_kernel_size=(5, 3)),  # kernels larger than the image
        replace(base, in_channels=17, hidden_channels=19, size=(5, 11)),
        replace(base, in_channels=33, hidden_channels=64, size=(3, 3), batch=5),
        replace(base, kernel_size=(1, 1), recurrent_kernel_size=(1, 1), size=(5, 5)),
        replace(base, kernel_size=(3, 1), recurrent_kernel_size=(1, 5)),
        replace(base, kernel_size=(2, 4), recurrent_kernel_size=(4, 2)),  # even: one more at the end
        replace(base, stride=(2, 2), size=(9, 8)),
        replace(base, stride=(2, 1), kernel_size=(1, 1), size=(6, 6)),
        replace(base, padding="valid", size=(8, 7)),
        replace(base, padding=(2, 0), size=(6, 7)),
        replace(base, padding=((0, 1), (2, 1)), stride=(2, 2), size=(8, 8)),
        replace(base, dilation=(2, 1), recurrent_dilation=(1, 3), size=(9, 8)),
        replace(base, gate_activation="hard_sigmoid"),
        replace(base, gate_activation="hard_sigmoid_keras2"),
        replace(base, reverse=True),
        replace(base, reverse=True, lengths=True, steps=5, batch=4),
        replace(base, bias=False, state=False),
        replace(base, lengths=True, steps=5, batch=4),
        replace(base, reset=True, steps=5, batch=4),
        replace(base, lengths=True, reset=True, steps=6, batch=4, state=False),
        replace(base, layout="channels_last", hidden_channels=16),
        replace(base, layout="batch_major", steps=4),
        replace(base, layout="sliced"),
        replace(base, layout="expanded"),
        replace(base, recompute_gates=True),
        replace(base, recompute_gates=True, lengths=True, reset=True, steps=5, batch=3, stride=(2, 2)),
        *(replace(base, padding_mode=mode) for mode in ("circular", "replicate", "reflect")),
        replace(base, padding_mode="circular", kernel_size=(5, 4), recurrent_kernel_size=(2, 5)),
    ]
    if cell == "conv_lstm2d":
        cases += [
            replace(base, peephole="channel"),
            replace(base, peephole="pixel"),
            replace(base, peephole="channel", lengths=True, reset=True, recompute_gates=True, steps=4, batch=3),
            replace(base, groups=2, in_channels=6, hidden_channels=8),
            replace(base, groups=3, in_channels=3, hidden_channels=54, recompute_gates=True),
        ]
    return cases


def case_id(case: Case) -> str:
    """The fields that differ from the defaults, as a readable test id."""
    default = Case(cell=case.cell)
    parts = [f"{k}={v}" for k, v in vars(case).items() if v != getattr(default, k)]
    return ",".join(parts).replace(" ", "") or "default"
