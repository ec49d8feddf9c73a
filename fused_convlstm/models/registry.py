"""Models by name: what recipes, checkpoints and the command line call them."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..configuration import from_dictionary, unknown_name
from .bidirectional import ResNetBiConvLSTM, ResNetBiConvLSTMConfig
from .gesture import (
    C3D,
    COMPONENTS,
    BiConvLSTMGesture,
    BiConvLSTMGestureConfig,
    GestureConfig,
    PyramidalC3D,
    Res3D,
    Res3DConvLSTMMobileNet,
    Res3DConvLSTMMobileNetConfig,
)
from .lip_baselines import VGGMLSTM, LipResNet, LipResNetConfig, VGGMConfig, VGGMMultitower
from .resnet import ResNetConvLSTM, ResNetConvLSTMConfig
from .resnet50 import ResNet50
from .streaming import ModelConfig, StreamingModel
from .vgg import VGGMConvLSTM, VGGMConvLSTMConfig
from .video_lstm import DESIGNS, VideoLSTM, VideoLSTMConfig

# A name stands for a class and the options that it starts from.
_models: dict[str, tuple[type[StreamingModel], ModelConfig]] = {}


def register_model(name: str, model: type[StreamingModel], defaults: ModelConfig) -> None:
    """``model`` is built from a configuration like ``defaults``, which ``create_model`` and recipes may change."""
    _models[name] = (model, defaults)


def model_names() -> list[str]:
    return sorted(_models)


def model_config(name: str, options: dict[str, Any], where: str = "") -> ModelConfig:
    """The configuration called ``name``, with ``options`` changed; an unknown name or option is a ValueError.

    ``where``: the path to the options, for errors.
    """
    if name not in _models:
        raise ValueError(f"name: {unknown_name(name, _models)}")
    _, defaults = _models[name]
    return from_dictionary(type(defaults), {**_options(defaults), **options}, where)


def create_model(name: str, **options: Any) -> StreamingModel:
    """A new model: ``create_model("resnet_convlstm", num_classes=10)``."""
    config = model_config(name, options)
    return _models[name][0](config)  # type: ignore[call-arg]


def _options(config: ModelConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


# The 3x3 scale goes, 12x12 and 6x6 become 2D convolutions (section 3.4).
_REDUCED: dict[str, Any] = {
    "blocks": (3, 4, 4),
    "mid_channels": (32, 64, 96),
    "out_channels": (64, 128, 192),
    "recurrent": (True, False, False),
}
# Small networks, for a CPU and little data.
_SMALL: dict[str, Any] = {
    "num_classes": 10,
    "blocks": (1, 1, 1, 1),
    "mid_channels": (8, 16, 24, 32),
    "out_channels": (16, 32, 48, 64),
    "head_channels": 64,
    "dropout": 0.2,
}
_SMALL_REDUCED: dict[str, Any] = {
    "num_classes": 10,
    "blocks": (1, 1, 1),
    "mid_channels": (8, 16, 24),
    "out_channels": (16, 32, 48),
    "recurrent": (True, False, False),
    "head_channels": 64,
    "dropout": 0.2,
}
# The same depth without memory, widened to the same number of parameters: what single frames can tell.
_FRAMES: dict[str, Any] = {
    "num_classes": 10,
    "blocks": (1, 1, 1, 1),
    "mid_channels": (8, 24, 64, 112),
    "out_channels": (16, 48, 96, 128),
    "recurrent": (False,) * 4,
    "head": "frame",
    "head_channels": 128,
    "dropout": 0.2,
}

register_model("vggm_convlstm", VGGMConvLSTM, VGGMConvLSTMConfig())
register_model("resnet_convlstm", ResNetConvLSTM, ResNetConvLSTMConfig())
register_model("resnet_biconvlstm", ResNetBiConvLSTM, ResNetBiConvLSTMConfig())
register_model("reduced_resnet_convlstm", ResNetConvLSTM, ResNetConvLSTMConfig(**_REDUCED))
register_model("reduced_resnet_biconvlstm", ResNetBiConvLSTM, ResNetBiConvLSTMConfig(**_REDUCED))
register_model(
    "vggm_convlstm_small",
    VGGMConvLSTM,
    VGGMConvLSTMConfig(num_classes=10, channels=(12, 16, 24, 24, 24), fc_channels=64, head_channels=64, dropout=0.2),
)
register_model("resnet_convlstm_small", ResNetConvLSTM, ResNetConvLSTMConfig(**_SMALL))
register_model("resnet_biconvlstm_small", ResNetBiConvLSTM, ResNetBiConvLSTMConfig(**_SMALL))
register_model("reduced_resnet_convlstm_small", ResNetConvLSTM, ResNetConvLSTMConfig(**_SMALL_REDUCED))
register_model("resnet_frames_small", ResNetConvLSTM, ResNetConvLSTMConfig(**_FRAMES))

# What Courtney & Sreenivas compare with (table 1).
register_model("vggm_multitower", VGGMMultitower, VGGMConfig())
register_model("vggm_lstm", VGGMLSTM, VGGMConfig())
register_model("resnet34_2d_conv", LipResNet, LipResNetConfig(front="2d", depth=34, backend="conv"))
register_model("resnet34_3d_conv", LipResNet, LipResNetConfig(front="3d", depth=34, backend="conv"))
register_model("resnet34_3d_bilstm", LipResNet, LipResNetConfig(front="3d", depth=34, backend="bilstm"))
register_model("resnet18_3d_bilstm", LipResNet, LipResNetConfig(front="3d", depth=18, backend="bilstm"))

# Gestures: Zhang et al., tables 1 and 2.
for _component in COMPONENTS:
    _name = f"res3d_{_component}_mobilenet"
    register_model(_name, Res3DConvLSTMMobileNet, Res3DConvLSTMMobileNetConfig(component=_component))
    register_model(
        f"{_name}_small",
        Res3DConvLSTMMobileNet,
        Res3DConvLSTMMobileNetConfig(component=_component, width=0.125, num_classes=10),
    )
register_model("cnn3d_biconvlstm_cnn2d", BiConvLSTMGesture, BiConvLSTMGestureConfig())
register_model("res3d", Res3D, GestureConfig())
register_model("c3d", C3D, GestureConfig(dropout=0.5))
register_model("pyramidal_c3d", PyramidalC3D, GestureConfig(dropout=0.5))
register_model("resnet50", ResNet50, GestureConfig())

# Actions: VideoLSTM and the designs that it is compared with.
_SMALL_VIDEO: dict[str, Any] = {
    "backbone": "small",
    "hidden_channels": 32,
    "motion_channels": 16,
    "backbone_channels": (16, 24, 32, 32),
    "head_channels": 64,
    "dropout": 0.2,
    "num_classes": 10,
    "motion": "difference",
}
for _design in DESIGNS:
    _channels = 5 if _design == "motion" else 3
    register_model(f"video_{_design}", VideoLSTM, VideoLSTMConfig(design=_design, in_channels=_channels))
    register_model(f"video_{_design}_small", VideoLSTM, VideoLSTMConfig(design=_design, **_SMALL_VIDEO))
