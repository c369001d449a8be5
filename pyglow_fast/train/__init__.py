"""Training: configuration, the loop, checkpoints, evaluation and pictures. Uses models, likelihood and data."""

from pyglow_fast.train.bar import progress_line
from pyglow_fast.train.checkpoint import Checkpoint, DataStamp
from pyglow_fast.train.config import ADJUSTABLE, LIMITS, OPTIONAL, TrainConfig
from pyglow_fast.train.config_file import read_config, to_toml
from pyglow_fast.train.evaluation import (
    ImageScores,
    Score,
    check_fits,
    device_of,
    evaluate,
    labels_for,
    score_images,
)
from pyglow_fast.train.figures import class_columns, class_cycle, grid, save_curve, save_grid, to_pixels
from pyglow_fast.train.files import FolderError
from pyglow_fast.train.loop import Result, Run
from pyglow_fast.train.machine import resolve_device
from pyglow_fast.train.optim import OPTIMIZERS, learning_rate, make_optimizer
from pyglow_fast.train.page import page_of
from pyglow_fast.train.ranks import RankError, Ranks, open_ranks
from pyglow_fast.train.run_folder import RunFolder, load_model
from pyglow_fast.train.runs import resume, start
from pyglow_fast.train.seeds import derive
from pyglow_fast.train.state import InputLostError, TrainingDivergedError, TrainState
from pyglow_fast.train.writer import SaveError

__all__ = [
    "ADJUSTABLE",
    "LIMITS",
    "OPTIMIZERS",
    "OPTIONAL",
    "Checkpoint",
    "DataStamp",
    "FolderError",
    "ImageScores",
    "InputLostError",
    "RankError",
    "Ranks",
    "Result",
    "Run",
    "RunFolder",
    "SaveError",
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
    "grid",
    "labels_for",
    "learning_rate",
    "load_model",
    "make_optimizer",
    "open_ranks",
    "page_of",
    "progress_line",
    "read_config",
    "resolve_device",
    "resume",
    "save_curve",
    "save_grid",
    "score_images",
    "start",
    "to_pixels",
    "to_toml",
]
