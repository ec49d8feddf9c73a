"""Action recognition: VideoLSTM (Li et al.) and the designs that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import check_choice
from ..modules import ALSTM, ConvALSTM2d, ConvLSTM2d, MotionAttentionConvLSTM2d
from .clips import initialize_convolutions, mean_over_steps, per_frame
from .layers import check_positive
from .streaming import Carry, ModelConfig, StreamingModel

DESIGNS = ("frames", "lstm", "alstm", "convlstm", "convalstm", "motion")
BACKBONES = ("vgg16", "small", "features")
MOTIONS = ("flow", "difference", "same")
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling


@dataclass(frozen=True, kw_only=True)
class VideoLSTMConfig(ModelConfig):
    """Options of :class:`VideoLSTM`.

    Attributes:
        in_channels: of the frames; with ``motion="flow"`` the flow's two are among them, at the end.
        design: "frames" (a ConvNet, averaged), "lstm" and "alstm" (on vectors), "convlstm", "convalstm", or "motion",
            which is VideoLSTM.
        backbone: "vgg16" up to pool5 (the layout of torchvision's ``vgg16().features``), "small" (a third of the
            layers), or "features": the frames are feature maps already.
        backbone_channels: of the small backbone's four convolutions. Its maps have 1/4 of the frame's size.
        hidden_channels: of the LSTM.
        motion: where the design "motion" takes it from: "flow", the last two channels of the input, the "difference"
            of each frame to the one before, or "same": the whole input, which is optical flow.
        motion_channels: of the small backbone on the motion, and of the motion ConvLSTM.
        initial_state: h_0 and c_0 are tanh of a convolution of the features' mean over time; the clip must be given
            whole then. Else they are zero.
        head_channels: of the tanh layer before the output.
        dropout: on both sides of it.
    """

    num_classes: int = 101
    in_channels: int = 3
    design: str = "convalstm"
    backbone: str = "vgg16"
    backbone_channels: tuple[int, ...] = (32, 64, 64, 64)
    hidden_channels: int = 512
    motion: str = "flow"
    motion_channels: int = 64
    initial_state: bool = True
    head_channels: int = 1024
    dropout: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.design, "design", DESIGNS)
        check_choice(self.backbone, "backbone", BACKBONES)
        check_choice(self.motion, "motion", MOTIONS)
        check_positive("backbone_channels", self.backbone_channels)
        check_positive("hidden_channels", [self.hidden_channels])
        check_positive("motion_channels", [self.motion_channels])
        check_positive("head_channels", [self.head_channels])
        if len(self.backbone_channels) != 4:
            raise ValueError(f"backbone_channels: expected 4 values, got {list(self.backbone_channels)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to less than 1, got {self.dropout}")
        if self.design == "motion" and self.backbone == "features":
            raise ValueError("backbone: expected 'vgg16' or 'small' with design='motion', got 'features'")


def make_vgg16(in_channels: int) -> nn.Sequential:
    """The 13 convolutions of VGG-16 and their poolings; parameters are named and shaped as in torchvision's
    ``vgg16().features``, whose state_dict loads."""
    layers: list[nn.Module] = []
    for channels in VGG16:
        if channels == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
            in_channels = channels
    return nn.Sequential(*layers)


def make_small_backbone(in_channels: int, channels: tuple[int, ...]) -> nn.Sequential:
    """Two convolutions of stride 2 and two of one pixel, with batch normalisation.

    A cell sees 7x7 pixels. Where cells see their neighbours too, or are normalised over a frame, they tell of what
    happens elsewhere, and attention does not have to be where something happens.
    """
    layers: list[nn.Module] = []
    for k, width in enumerate(channels):
        kernel, stride = (3, 2) if k < 2 else (1, 1)
        layers += [
            nn.Conv2d(in_channels, width, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        in_channels = width
    return nn.Sequential(*layers)


class VideoLSTM(StreamingModel):
    """A ConvNet on every frame, one of the LSTMs of the slides on its maps, classes at every step.

    The output of a clip is the sum (the mean) over its steps.
    """

    config: VideoLSTMConfig

    def __init__(self, config: VideoLSTMConfig) -> None:
        super().__init__()
        self.config = config
        flow = config.design == "motion" and config.motion == "flow"
        image_channels = config.in_channels - (2 if flow else 0)
        if image_channels < 1:
            raise ValueError(f"in_channels: expected those of the image and 2 of the flow, got {config.in_channels}")
        self.image_channels = image_channels
        self.backbone: nn.Module = nn.Identity()
        features = image_channels
        if config.backbone == "vgg16":
            self.backbone, features = make_vgg16(image_channels), 512
        elif config.backbone == "small":
            self.backbone = make_small_backbone(image_channels, config.backbone_channels)
            features = config.backbone_channels[-1]
        initialize_convolutions(self.backbone)
        hidden = config.hidden_channels
        self.lstm: nn.Module | None = None
        if config.design == "lstm":
            self.lstm = nn.LSTM(features, hidden)
        elif config.design == "alstm":
            self.lstm = ALSTM(features, hidden)
        elif config.design == "convlstm":
            self.lstm = ConvLSTM2d(features, hidden, 3)
        elif config.design == "convalstm":
            self.lstm = ConvALSTM2d(features, hidden, 3)
        elif config.design == "motion":
            self.motion_backbone = make_small_backbone(
                2 if flow else image_channels, (*config.backbone_channels[:3], config.motion_channels)
            )
            initialize_convolutions(self.motion_backbone)
            self.lstm = MotionAttentionConvLSTM2d(
                features, config.motion_channels, hidden, 3, motion_hidden_channels=config.motion_channels
            )
        # An LSTM on vectors has no convolutional state, and single frames have none at all.
        self.scales = () if config.design in ("frames", "lstm") else ("lstm",)
        learned = config.initial_state and config.design != "frames"
        self.initial = nn.Conv2d(features, 2 * hidden, 1) if learned else None
        self.streams = not learned
        outputs = hidden if self.lstm is not None else features
        self.fc = nn.Linear(outputs, config.head_channels)
        self.head = nn.Linear(config.head_channels, config.num_classes)

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        if not self.streams and carry.before is not None:
            raise ValueError("state: expected None: with initial_state the model needs the whole clip at once")
        if carry.valid is not None:
            frames = frames.masked_fill(~carry.valid[:, :, None, None, None], 0)
        images = frames[:, :, : self.image_channels]
        x = per_frame(self.backbone, images, carry.valid)  # (T, B, C, h, w)
        scope = carry.scope("lstm", resets.get("lstm"))
        h_0, c_0 = self._initial_state(x, carry)
        if isinstance(self.lstm, MotionAttentionConvLSTM2d):
            x = self._motion(self.lstm, x, frames, scope, h_0, c_0)
        elif isinstance(self.lstm, nn.LSTM):
            state = None if h_0 is None or c_0 is None else (h_0.mean(dim=(2, 3)), c_0.mean(dim=(2, 3)))
            x = scope.lstm("lstm", self.lstm, x.mean(dim=(3, 4)), state)
        elif isinstance(self.lstm, ALSTM):
            state = None if h_0 is None or c_0 is None else (h_0.mean(dim=(2, 3)), c_0.mean(dim=(2, 3)))
            x = scope.conv_lstm("lstm", self.lstm, x, state)
        elif isinstance(self.lstm, (ConvLSTM2d, ConvALSTM2d)):
            x = scope.conv_lstm("lstm", self.lstm, x, None if h_0 is None or c_0 is None else (h_0, c_0))
        if x.dim() == 5:
            x = x.mean(dim=(3, 4))
        x = torch.tanh(self.fc(self._dropout(x, carry, "features")))
        return self.head(self._dropout(x, carry, "hidden"))  # type: ignore[no-any-return]

    def _initial_state(self, x: Tensor, carry: Carry) -> tuple[Tensor | None, Tensor | None]:
        """h_0 and c_0, each (B, C, h, w)."""
        if self.initial is None:
            return None, None
        h_0, c_0 = torch.tanh(self.initial(mean_over_steps(x, carry.valid))).chunk(2, dim=1)
        return h_0, c_0

    def _motion(
        self,
        lstm: MotionAttentionConvLSTM2d,
        x: Tensor,  # (T, B, C, h, w)
        frames: Tensor,  # (T, B, C, H, W)
        carry: Carry,
        h_0: Tensor | None,
        c_0: Tensor | None,
    ) -> Tensor:  # (T, B, C, h, w)
        if self.config.motion == "flow":
            motion = frames[:, :, self.image_channels :]
        elif self.config.motion == "same":
            motion = frames
        else:
            before = carry.get("frame")
            motion = frames - torch.cat((frames[:1] if before is None else before[None], frames[:-1]))
            carry.put("frame", last_valid(frames, before, carry.lengths))
        motion = per_frame(self.motion_backbone, motion, carry.valid)
        if motion.shape[3:] != x.shape[3:]:  # VGG-16's maps are smaller than those of the small backbone
            motion = F.adaptive_avg_pool2d(motion.flatten(0, 1), (x.size(3), x.size(4))).unflatten(0, motion.shape[:2])
        hx = None
        before_h, before_c = carry.get("lstm.h"), carry.get("lstm.c")
        motion_h, motion_c = carry.get("motion.h"), carry.get("motion.c")
        if before_h is not None and before_c is not None and motion_h is not None and motion_c is not None:
            hx = ((before_h[None], before_c[None]), (motion_h[None], motion_c[None]))
        elif h_0 is not None and c_0 is not None:
            zeros = motion.new_zeros((motion.size(1), self.config.motion_channels, *motion.shape[3:]))
            hx = ((h_0[None], c_0[None]), (zeros[None], zeros[None]))
        output, (state, motion_state) = lstm(x, motion, hx, lengths=carry.lengths, reset=carry.reset)
        for name, (h, c) in (("lstm", state), ("motion", motion_state)):
            carry.put(f"{name}.h", h[0])
            carry.put(f"{name}.c", c[0])
        return output  # type: ignore[no-any-return]

    def _dropout(self, x: Tensor, carry: Carry, name: str) -> Tensor:
        """Dropout with one mask for the whole sequence, which belongs to the state."""
        if not self.training or self.config.dropout == 0.0:
            return x
        mask = carry.get(f"{name}.mask")
        if mask is None:
            mask = F.dropout(torch.ones_like(x[0]), self.config.dropout)
        carry.put(f"{name}.mask", mask)
        return x * mask


def last_valid(
    x: Tensor,  # (T, B, ...)
    before: Tensor | None,  # (B, ...)
    lengths: Tensor | None,  # (B,)
) -> Tensor:  # (B, ...)
    """Each sample's last valid step; where it has none, ``before``, or zeros."""
    if lengths is None:
        return x[-1]
    first = torch.zeros_like(x[0]) if before is None else before
    return torch.cat((first[None], x))[lengths.to(x.device), torch.arange(x.size(1), device=x.device)]
