"""Datasets: readers, ``prepare``, the cache as a PyTorch dataset, and transforms. Needs ``fused-convlstm[train]``."""

from . import procedural
from .crops import BoxCrop, Crop, MouthCrop, NoFaceError, WholeFrame
from .dataset import Batch, Clip, ClipDataset, collate, cut_words
from .files import PrepareError
from .flow import FLOW_LEVELS, FLOW_METHODS, FLOW_ZERO, optical_flow
from .items import Item, Problem, Reader, Word, split_by_name
from .prepare import PrepareReport, load_frames, prepare
from .readers import GRID, GRID_WORDS, LRS, LRW, LRWCrops, WordFolders
from .transforms import TrainTransform, center_crop, normalise, segment_frames, six_crops, uniform_frames
from .video import VideoError, read_video, write_video
from .video_readers import HMDB51, UCF101, IsoGD, Jester

__all__ = [
    "FLOW_LEVELS",
    "FLOW_METHODS",
    "FLOW_ZERO",
    "GRID",
    "GRID_WORDS",
    "HMDB51",
    "LRS",
    "LRW",
    "UCF101",
    "Batch",
    "BoxCrop",
    "Clip",
    "ClipDataset",
    "Crop",
    "IsoGD",
    "Item",
    "Jester",
    "LRWCrops",
    "MouthCrop",
    "NoFaceError",
    "PrepareError",
    "PrepareReport",
    "Problem",
    "Reader",
    "TrainTransform",
    "VideoError",
    "WholeFrame",
    "Word",
    "WordFolders",
    "center_crop",
    "collate",
    "cut_words",
    "load_frames",
    "normalise",
    "optical_flow",
    "prepare",
    "procedural",
    "read_video",
    "segment_frames",
    "six_crops",
    "split_by_name",
    "uniform_frames",
    "write_video",
]
