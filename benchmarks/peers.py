"""What people use today: the loop over conv2d on cat([x, h]), split, three sigmoids, two tanh.

Each shape is compared with the fastest of: this loop, the loop in channels_last, the loop with its step under
torch.compile (compiling all steps as one graph takes a minute and gains nothing measurable on a CPU).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_convlstm import reference
from fused_convlstm.backends.call import ConvLSTMOptions, same_padding


class LoopConvLSTM(nn.Module):
    """One layer over (T, B, Cin, H, W), written the usual way; returns output, h, c.

    With stride 1, one convolution over the concatenation of input and state. With a stride, input and state have
    different sizes, so there are two.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        both = in_channels + hidden_channels
        if stride == 1:
            self.conv = nn.Conv2d(both, 4 * hidden_channels, kernel, padding=kernel // 2)
        else:
            self.conv_x = nn.Conv2d(in_channels, 4 * hidden_channels, kernel, stride, padding=kernel // 2)
            self.conv_h = nn.Conv2d(hidden_channels, 4 * hidden_channels, kernel, padding=kernel // 2, bias=False)

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(torch.cat((x, h), dim=1)) if self.stride == 1 else self.conv_x(x) + self.conv_h(h)
        i, f, g, o = z.chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = []
        for x in input:
            h, c = self.step(x, h, c)
            outputs.append(h)
        return torch.stack(outputs), h, c


class PlainPooledGate(nn.Module):
    """The pooled-gate cell in plain PyTorch, step by step: the reference function over its parameters."""

    def __init__(self, module: nn.Module, kernel: int) -> None:
        super().__init__()
        names = (
            "gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh", "pointwise_ih",
            "pointwise_hh", "bias",
        )  # fmt: skip
        self.weights = nn.ParameterList([getattr(module, f"{name}_l0") for name in names])
        self.options = ConvLSTMOptions(padding=same_padding((kernel, kernel), (1, 1)))

    def step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return reference.pooled_gate_conv_lstm2d_cell(x, h, c, *self.weights, self.options)

    def forward(self, input: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = []
        for x in input:
            h, c = self.step(x, h, c)
            outputs.append(h)
        return torch.stack(outputs), h, c


def copy_weights(loop: LoopConvLSTM, module: nn.Module) -> None:
    """The parameters of a ConvLSTM2d into the loop, so that both compute the same."""
    with torch.no_grad():
        if loop.stride == 1:
            loop.conv.weight.copy_(torch.cat((module.weight_ih_l0, module.weight_hh_l0), dim=1))
            loop.conv.bias.copy_(module.bias_l0)
        else:
            loop.conv_x.weight.copy_(module.weight_ih_l0)
            loop.conv_h.weight.copy_(module.weight_hh_l0)
            loop.conv_x.bias.copy_(module.bias_l0)


def channels_last(frames: Tensor) -> Tensor:
    """(T, B, C, H, W) or (B, C, H, W) with the channels innermost."""
    return frames.movedim(-3, -1).contiguous().movedim(-1, -3)
