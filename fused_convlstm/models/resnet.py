"""ResNet ConvLSTM and what is made of it (Courtney & Sreenivas, sections 3.3 and 3.4, fig. 3b and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .heads import Head
from .layers import ResConvLSTM, check_positive, set_forget_bias
from .streaming import Carry, ModelConfig, StreamingModel


@dataclass(frozen=True, kw_only=True)
class ResNetConvLSTMConfig(ModelConfig):
    """Options of :class:`ResNetConvLSTM`.

    The paper gives 48 layers and 14.5 M parameters, not the widths: these are ours, within 1 % of its count.

    Attributes:
        blocks: sub-blocks of each module, one module a scale.
        mid_channels: channels of the ConvLSTMs of each module.
        out_channels: channels between the sub-blocks.
        recurrent: whether the 3x3 and skip layers of each module are ConvLSTMs (True) or 2D convolutions (False).
        head: "lstm", "attention" or "frame".
        head_channels: of the back-end.
        dropout: before the back-end, one mask a sequence.
        norm: "batch", "group" or "none", after each 2D convolution.
        forget_bias: of the ConvLSTMs, at the start of training.
    """

    blocks: tuple[int, ...] = (3, 4, 4, 3)
    mid_channels: tuple[int, ...] = (32, 64, 96, 128)
    out_channels: tuple[int, ...] = (64, 128, 192, 256)
    recurrent: tuple[bool, ...] = (True, True, True, True)
    head: str = "lstm"
    head_channels: int = 1024
    dropout: float = 0.5
    norm: str = "batch"
    forget_bias: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mid_channels", "out_channels", "recurrent"):
            values = getattr(self, name)
            if len(values) != len(self.blocks):
                raise ValueError(f"{name}: expected {len(self.blocks)} values, one a module, got {list(values)}")
            check_positive(name, [] if name == "recurrent" else values)
        check_positive("blocks", self.blocks)
        check_positive("head_channels", [self.head_channels])


class ResNetConvLSTM(StreamingModel):
    """Res_ConvLSTM modules, each of which halves the frame, then global pooling and the head."""

    config: ResNetConvLSTMConfig

    def __init__(self, config: ResNetConvLSTMConfig) -> None:
        super().__init__()
        self.config = config
        self.modules_by_scale = nn.ModuleDict()
        channels = config.in_channels
        for k, (n, mid, out, recurrent) in enumerate(
            zip(config.blocks, config.mid_channels, config.out_channels, config.recurrent, strict=True)
        ):
            self.modules_by_scale[f"s{2 ** (k + 1)}"] = ResConvLSTM(n, channels, mid, out, recurrent, config.norm)
            channels = out
        set_forget_bias(self, config.forget_bias)
        self.scales = tuple(
            scale for scale, recurrent in zip(self.modules_by_scale, config.recurrent, strict=True) if recurrent
        )
        self.head = Head(config.head, channels, config.head_channels, config.num_classes, config.dropout)

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = frames
        for scale, module in self.modules_by_scale.items():
            x = module(x, carry.scope(scale, resets.get(scale)))
        return self.head(x, carry.scope("head"))  # type: ignore[no-any-return]
