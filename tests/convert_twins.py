"""Twins of the ConvLSTMs of other frameworks, as functions of their arrays, written from descriptions.

Channels stand last, kernels are (kh, kw, in, out), as in TensorFlow, Keras and JAX, unless said otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def same_pad(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Zeros around x (B, C, H, W) so that ceil(size / stride) windows fit; an odd one at the end."""
    pads: list[int] = []
    for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        windows = -(-n // s)
        total = max(0, (windows - 1) * s + (k - 1) * d + 1 - n)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


def conv(x: Tensor, kernel: Tensor, padding: str = "same", stride=(1, 1), dilation=(1, 1)) -> Tensor:
    """A convolution with channels last."""
    x, weight = x.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
    if padding == "same":
        x = same_pad(x, tuple(kernel.shape[:2]), stride, dilation)
    return F.conv2d(x, weight, None, stride, 0, dilation).permute(0, 2, 3, 1)


HARD = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid of Keras 2": lambda x: torch.clip(0.2 * x + 0.5, 0, 1),
    "hard_sigmoid of Keras 3": lambda x: F.relu6(x + 3) / 6,
}


def keras_step(weights: dict[str, Tensor], x, h, c, gate="sigmoid", **options) -> tuple[Tensor, Tensor]:
    """Keras: kernel, recurrent_kernel, bias; i, f, c, o."""
    sigma = HARD[gate]
    z = conv(x, weights["kernel"], **options) + conv(h, weights["recurrent_kernel"])
    i, f, g, o = (z + weights.get("bias", 0)).chunk(4, dim=-1)
    c = sigma(f) * c + sigma(i) * torch.tanh(g)
    return sigma(o) * torch.tanh(c), c


def tensorflow_step(weights: dict[str, Tensor], x, h, c) -> tuple[Tensor, Tensor]:
    """contrib's ConvLSTMCell: one kernel over x and h; i, g, f, o; 1 is added to f."""
    i, g, f, o = (conv(torch.cat([x, h], dim=-1), weights["kernel"]) + weights["biases"]).chunk(4, dim=-1)
    c = c * torch.sigmoid(f + 1.0) + torch.sigmoid(i) * torch.tanh(g)
    return torch.tanh(c) * torch.sigmoid(o), c


def flax_step(weights: dict[str, dict[str, Tensor]], x, h, c) -> tuple[Tensor, Tensor]:
    """Flax: nested parameters, two biases; i, g, f, o; 1 is added to f."""
    z = conv(x, weights["ih"]["kernel"]) + weights["ih"]["bias"]
    i, g, f, o = (z + conv(h, weights["hh"]["kernel"]) + weights["hh"]["bias"]).chunk(4, dim=-1)
    c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def sonnet_step(weights: dict[str, dict[str, Tensor] | Tensor], x, h, c) -> tuple[Tensor, Tensor]:
    """Sonnet 2: i, f, g, o; the forget bias is in b."""
    z = conv(x, weights["input_to_hidden"]["w"]) + conv(h, weights["hidden_to_hidden"]["w"]) + weights["b"]
    i, f, g, o = z.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def mxnet_step(weights: dict[str, Tensor], x, h, c) -> tuple[Tensor, Tensor]:
    """MXNet: channels first, kernels (out, in, kh, kw), two biases; i, f, c, o."""
    k = weights["h2h_weight"].shape[2:]
    z = F.conv2d(x, weights["i2h_weight"], weights["i2h_bias"], padding="same")
    z = z + F.conv2d(h, weights["h2h_weight"], weights["h2h_bias"], padding=(k[0] // 2, k[1] // 2))
    i, f, g, o = z.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def attention_conv_lstm_step(weights: dict[str, Tensor], x, h, c) -> tuple[Tensor, Tensor]:
    """Variant (a) in the authors' code: gates from pooled x and h, separable candidate, hard gates."""

    def separable(y: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        out = torch.stack(
            [conv(y[..., k : k + 1], depthwise[:, :, k : k + 1])[..., 0] for k in range(y.size(-1))], dim=-1
        )
        return conv(out, pointwise)

    x_mean, h_mean = x.mean(dim=(1, 2), keepdim=True), h.mean(dim=(1, 2), keepdim=True)
    z = conv(x_mean, weights["gate_kernel"]) + conv(h_mean, weights["recurrent_gate_kernel"])
    i, f, o = map(HARD["hard_sigmoid of Keras 2"], (z + weights.get("gate_bias", 0)).chunk(3, dim=-1))
    g = separable(x, weights["depthwise_kernel"], weights["pointwise_kernel"])
    g = g + separable(h, weights["recurrent_depthwise_kernel"], weights["recurrent_pointwise_kernel"])
    c = f * c + i * torch.tanh(g + weights.get("bias", 0))
    return o * torch.tanh(c), c


class KerasLayer:
    """What from_keras needs to see of a Keras layer, and what that layer computes.

    ``config`` has Keras' names; ``weights`` one dictionary a direction.
    """

    def __init__(self, weights: list[dict[str, Tensor]], input_shape=None, gate="sigmoid", **config) -> None:
        self.weights, self.gate, self.input_shape = weights, gate, input_shape
        self.config = {"strides": (1, 1), "padding": "valid", "dilation_rate": (1, 1)} | config

    def get_weights(self):
        return [array.numpy() for one in self.weights for array in one.values()]

    def get_config(self):
        return self.config

    def get_build_config(self):
        return {"input_shape": self.input_shape}

    def loop(self, x: Tensor, weights: dict[str, Tensor], state=None) -> tuple[Tensor, Tensor, Tensor]:
        """Over (B, T, H, W, C) in the order given: outputs, h, c."""
        options = {
            "padding": self.config["padding"], "stride": tuple(self.config["strides"]),
            "dilation": tuple(self.config["dilation_rate"]),
        }  # fmt: skip
        if state is None:
            shape = conv(x[:, 0], weights["kernel"], **options).shape
            zeros = x.new_zeros(*shape[:3], shape[3] // 4)
            state = (zeros, zeros)
        h, c = state
        outputs = []
        for t in range(x.size(1)):
            h, c = keras_step(weights, x[:, t], h, c, self.gate, **options)
            outputs.append(h)
        return torch.stack(outputs, dim=1), h, c

    def __call__(self, x: Tensor, states=None):
        """Over (B, T, H, W, C)."""
        config = self.config
        outputs, h, c = self.loop(x.flip(1) if config.get("go_backwards") else x, self.weights[0], states)
        return outputs if config.get("return_sequences") else h, h, c


class ConvLSTM2D(KerasLayer):
    pass


class Bidirectional(KerasLayer):
    def get_config(self):
        inner = dict(self.config)
        return {"merge_mode": inner.pop("merge_mode"), "layer": {"class_name": "ConvLSTM2D", "config": inner}}

    def __call__(self, x: Tensor):
        forward, h_f, c_f = self.loop(x, self.weights[0])
        backward, h_b, c_b = self.loop(x.flip(1), self.weights[1])
        a, b = (forward, backward.flip(1)) if self.config["return_sequences"] else (h_f, h_b)
        merged = {
            "concat": lambda: torch.cat([a, b], dim=-1), "sum": lambda: a + b, "ave": lambda: (a + b) / 2,
            "mul": lambda: a * b,
        }[self.config["merge_mode"]]()  # fmt: skip
        return merged, h_f, c_f, h_b, c_b
