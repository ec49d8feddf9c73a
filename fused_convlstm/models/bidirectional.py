"""Two networks that read a clip from its two ends (Courtney & Sreenivas, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .resnet import ResNetConvLSTM, ResNetConvLSTMConfig
from .streaming import Carry, StreamingModel


@dataclass(frozen=True, kw_only=True)
class ResNetBiConvLSTMConfig(ResNetConvLSTMConfig):
    """Options of :class:`ResNetBiConvLSTM`: those of each of its two networks."""


class ResNetBiConvLSTM(StreamingModel):
    """A ResNet ConvLSTM, and a second one that gets the clip reversed; their outputs are averaged.

    Step t of the output is after the first t + 1 frames of one network and the last t + 1 of the other. The reversed
    network starts from the weights of the trained forward one (:meth:`from_forward`) and is trained alone, on reversed
    clips. As it begins with the last frame, a clip has to be given whole.
    """

    config: ResNetBiConvLSTMConfig
    streams = False

    def __init__(self, config: ResNetBiConvLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.forward_network = ResNetConvLSTM(config)
        self.reversed_network = ResNetConvLSTM(config)
        self.scales = self.forward_network.scales

    @classmethod
    def from_forward(cls, network: ResNetConvLSTM) -> ResNetBiConvLSTM:
        """Both networks with the weights of ``network``."""
        options = {name: getattr(network.config, name) for name in ResNetConvLSTMConfig.__dataclass_fields__}
        model = cls(ResNetBiConvLSTMConfig(**options))
        model.forward_network.load_state_dict(network.state_dict())
        model.reversed_network.load_state_dict(network.state_dict())
        return model

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        if carry.before is not None:
            raise ValueError("state: expected None: a bidirectional model needs the whole clip at once")
        outputs, states = [], {}
        for name, network, clip in (
            ("forward", self.forward_network, frames),
            ("reversed", self.reversed_network, reverse_frames(frames, carry.lengths)),
        ):
            output, state = network(clip, lengths=carry.lengths, resets=resets)
            outputs.append(output)
            states.update({f"{name}.{key}": tensor for key, tensor in state.items()})
        carry.after.update(states)
        return (outputs[0] + outputs[1]) / 2


def reverse_frames(
    frames: Tensor,  # (T, B, ...)
    lengths: Tensor | None,  # (B,)
) -> Tensor:  # (T, B, ...)
    """Every sample's valid frames in reversed order; what lies past its end stays."""
    if lengths is None:
        return frames.flip(0)
    steps = torch.arange(frames.size(0), device=frames.device)[:, None]  # (T, 1)
    lengths = lengths.to(frames.device)
    index = torch.where(steps < lengths, lengths - 1 - steps, steps)  # (T, B)
    return frames[index, torch.arange(frames.size(1), device=frames.device)]
