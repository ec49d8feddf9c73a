"""What a trained model does: evaluation, sensitivity to resets, reading a video. Needs ``fused-convlstm[train]``."""

from .evaluate import evaluate
from .localization import attention_tube, box_iou
from .maps import attention_maps, fusion_maps, recording
from .predict import read_stream, read_words
from .reader import TrainedReader
from .sensitivity import sensitivity
from .visualize import fuse, localize, visualize

__all__ = [
    "TrainedReader",
    "attention_maps",
    "attention_tube",
    "box_iou",
    "evaluate",
    "fuse",
    "fusion_maps",
    "localize",
    "read_stream",
    "read_words",
    "recording",
    "sensitivity",
    "visualize",
]
