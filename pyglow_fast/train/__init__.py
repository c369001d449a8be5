"""Training: configuration, the loop, checkpoints, evaluation and pictures. Uses models, likelihood and data."""

from pyglow_fast.train.checkpoint import Checkpoint, DataStamp
from pyglow_fast.train.config import ADJUSTABLE, OPTIMIZERS, TrainConfig
from pyglow_fast.train.evaluation import Score, check_fits, device_of, evaluate, labels_for
from pyglow_fast.train.figures import class_columns, class_cycle, save_curve, save_grid, to_levels
from pyglow_fast.train.loop import Result, Run, resume, start
from pyglow_fast.train.run_folder import FolderError, RunFolder, load_model
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import TrainingDivergedError, TrainState, resolve_device

__all__ = [
    "ADJUSTABLE",
    "OPTIMIZERS",
    "Checkpoint",
    "DataStamp",
    "FolderError",
    "Result",
    "Run",
    "RunFolder",
    "Score",
    "TrainConfig",
    "TrainState",
    "TrainingDivergedError",
    "check_fits",
    "class_columns",
    "class_cycle",
    "derive",
    "device_of",
    "evaluate",
    "labels_for",
    "load_model",
    "resolve_device",
    "resume",
    "save_curve",
    "save_grid",
    "start",
    "to_levels",
]
