"""Training: configuration, the loop, checkpoints, evaluation and pictures.

Read loop.py first, then state.py, which is one update. The folder may import every other one but app.
"""

from pyglow_fast._core.files import FolderError
from pyglow_fast.train.bar import progress_line
from pyglow_fast.train.checkpoint import Checkpoint
from pyglow_fast.train.config import TrainConfig, read_config, to_toml
from pyglow_fast.train.evaluation import ImageScores, Score, evaluate, score_images
from pyglow_fast.train.figures import class_columns, grid, histogram_png, save_grid, to_pixels
from pyglow_fast.train.loop import Result, Run, resume, start
from pyglow_fast.train.page import page_of
from pyglow_fast.train.ranks import RankError, Ranks, open_ranks
from pyglow_fast.train.run_folder import RunFolder, load_model
from pyglow_fast.train.scores import ScoredImages, score_csv
from pyglow_fast.train.state import InputLostError, TrainingDivergedError, TrainState
from pyglow_fast.train.writer import SaveError

__all__ = [
    "Checkpoint",
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
    "ScoredImages",
    "TrainConfig",
    "TrainState",
    "TrainingDivergedError",
    "class_columns",
    "evaluate",
    "grid",
    "histogram_png",
    "load_model",
    "open_ranks",
    "page_of",
    "progress_line",
    "read_config",
    "resume",
    "save_grid",
    "score_csv",
    "score_images",
    "start",
    "to_pixels",
    "to_toml",
]
