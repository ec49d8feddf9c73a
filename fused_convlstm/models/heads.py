"""From the features of every frame to an output at every frame."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import check_choice
from .streaming import Carry

HEADS = ("lstm", "attention", "frame")


class Head(nn.Module):
    """Global average pooling, dropout with one mask for the whole sequence, a back-end, the output layer.

    Args:
        kind: "lstm" (section 3.3), "attention" (for characters, with CTC), or "frame", which sees each frame alone.
    """

    def __init__(self, kind: str, features: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        check_choice(kind, "head", HEADS)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to less than 1, got {dropout}")
        self.dropout = dropout
        self.backend: nn.LSTM | RunningAttention | nn.Linear
        if kind == "lstm":
            self.backend = nn.LSTM(features, channels)
            _initialize_lstm(self.backend)
        elif kind == "attention":
            self.backend = RunningAttention(features, channels)
            channels = 2 * features
        else:
            self.backend = nn.Linear(features, channels)
        self.output = nn.Linear(channels, num_classes)

    def forward(
        self,
        x: Tensor,  # (T, B, C, H, W)
        carry: Carry,
    ) -> Tensor:  # (T, B, num_classes)
        features = x.mean(dim=(3, 4))
        if self.training and self.dropout > 0.0:
            # The mask belongs to the state: a sequence that is trained in chunks keeps its one mask.
            mask = carry.get("mask")
            if mask is None:
                mask = F.dropout(torch.ones_like(features[0]), self.dropout)
            carry.put("mask", mask)
            features = features * mask
        if isinstance(self.backend, nn.LSTM):
            y = carry.lstm("lstm", self.backend, features)
        elif isinstance(self.backend, RunningAttention):
            y = self.backend(features, carry)
        else:
            y = F.relu(self.backend(features))
        return self.output(y)  # type: ignore[no-any-return]


class RunningAttention(nn.Module):
    """The attention of Yang et al. 2016 over the frames so far, beside the features of the frame itself.

    u_t = tanh(W f_t + b), a_k = softmax over k <= t of (v . u_k), s_t = sum over k <= t of a_k f_k; the output is
    (f_t, s_t). The weighted sum, the sum of weights and the largest score are carried along, so it streams.
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Linear(features, channels)
        self.context = nn.Parameter(torch.randn(channels) / channels**0.5)

    def forward(
        self,
        features: Tensor,  # (T, B, F)
        carry: Carry,
    ) -> Tensor:  # (T, B, 2 * F)
        scores = (torch.tanh(self.projection(features)).float() * self.context.float()).sum(-1)  # (T, B)
        if carry.valid is not None:
            scores = scores.masked_fill(~carry.valid, -torch.inf)
        values = features.float()
        # The largest score so far is subtracted before each exponential: no weight exceeds 1, and none overflows.
        tops, weighted, totals = carry.get("top"), carry.get("weighted"), carry.get("total")
        if tops is None or weighted is None or totals is None:
            tops = scores.new_full((scores.size(1),), torch.finfo(torch.float32).min)
            weighted, totals = torch.zeros_like(values[0]), torch.zeros_like(scores[0])
        contexts = []
        for score, value in zip(scores, values, strict=True):
            top = torch.maximum(tops, score)
            old, new = torch.exp(tops - top), torch.exp(score - top)
            weighted = weighted * old[:, None] + value * new[:, None]
            totals = totals * old + new
            tops = top
            contexts.append(weighted / totals.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
        carry.put("top", tops)
        carry.put("weighted", weighted)
        carry.put("total", totals)
        return torch.cat((features, torch.stack(contexts).to(features.dtype)), dim=-1)


def _initialize_lstm(layer: nn.LSTM) -> None:
    """Glorot input weights, orthogonal recurrent ones, forget-gate bias 1: as for the ConvLSTMs."""
    parameters = dict(layer.named_parameters())
    nn.init.xavier_uniform_(parameters["weight_ih_l0"])
    with torch.no_grad():
        for block in parameters["weight_hh_l0"].chunk(4):
            nn.init.orthogonal_(block)
        nn.init.zeros_(parameters["bias_hh_l0"])
        nn.init.zeros_(parameters["bias_ih_l0"])
        parameters["bias_ih_l0"].chunk(4)[1].fill_(1.0)
