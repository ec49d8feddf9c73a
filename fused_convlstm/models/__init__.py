"""Deep networks of ConvLSTMs."""

from .bidirectional import ResNetBiConvLSTM, ResNetBiConvLSTMConfig, reverse_frames
from .clips import ClipModel
from .files import load_model, save_model
from .gesture import (
    C3D,
    BiConvLSTMGesture,
    BiConvLSTMGestureConfig,
    GestureConfig,
    PyramidalC3D,
    Res3D,
    Res3DConvLSTMMobileNet,
    Res3DConvLSTMMobileNetConfig,
)
from .lip_baselines import VGGMLSTM, LipResNet, LipResNetConfig, VGGMConfig, VGGMMultitower
from .registry import create_model, model_config, model_names, register_model
from .resnet import ResNetConvLSTM, ResNetConvLSTMConfig
from .resnet50 import ResNet50
from .streaming import ModelConfig, ModelState, StreamingModel, detach_state, every
from .vgg import VGGMConvLSTM, VGGMConvLSTMConfig
from .video_lstm import VideoLSTM, VideoLSTMConfig

__all__ = [
    "C3D",
    "VGGMLSTM",
    "BiConvLSTMGesture",
    "BiConvLSTMGestureConfig",
    "ClipModel",
    "GestureConfig",
    "LipResNet",
    "LipResNetConfig",
    "ModelConfig",
    "ModelState",
    "PyramidalC3D",
    "Res3D",
    "Res3DConvLSTMMobileNet",
    "Res3DConvLSTMMobileNetConfig",
    "ResNet50",
    "ResNetBiConvLSTM",
    "ResNetBiConvLSTMConfig",
    "ResNetConvLSTM",
    "ResNetConvLSTMConfig",
    "StreamingModel",
    "VGGMConfig",
    "VGGMConvLSTM",
    "VGGMConvLSTMConfig",
    "VGGMMultitower",
    "VideoLSTM",
    "VideoLSTMConfig",
    "create_model",
    "detach_state",
    "every",
    "load_model",
    "model_config",
    "model_names",
    "register_model",
    "reverse_frames",
    "save_model",
]
