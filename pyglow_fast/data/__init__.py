"""Images to train on: sources, the held-out split, and yardsticks. Imports torch and data libraries only."""

from pyglow_fast.data._optional import MissingExtraError, optional
from pyglow_fast.data.digits import load_digits
from pyglow_fast.data.folder import load_folder
from pyglow_fast.data.image_set import ImageSet, split
from pyglow_fast.data.sources import DATA_HELP, DataConfig, load_data
from pyglow_fast.data.yardsticks import Yardstick, histogram_bits_per_dim, measure_yardsticks, png_bits_per_dim

__all__ = [
    "DATA_HELP",
    "DataConfig",
    "ImageSet",
    "MissingExtraError",
    "Yardstick",
    "histogram_bits_per_dim",
    "load_data",
    "load_digits",
    "load_folder",
    "measure_yardsticks",
    "optional",
    "png_bits_per_dim",
    "split",
]
