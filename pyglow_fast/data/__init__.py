"""Loads the images to train on, splits off what is held out, makes batches and measures yardsticks.

Read sources.py first. The folder may import _core, likelihood and presets, and libraries that read images.
"""

from pyglow_fast.data._optional import MissingExtraError, check_installed, optional
from pyglow_fast.data.config import DATA_HELP, SOURCES, DataConfig
from pyglow_fast.data.fetch import FETCHABLE, Fetchable, FetchError, data_folder, fetch
from pyglow_fast.data.files import UnreadableImageError, read_single
from pyglow_fast.data.image_set import Attributes, Augmentation, Images, ImageSet, split
from pyglow_fast.data.lazy import LazyImages, from_dataset
from pyglow_fast.data.loader import Batch, batches
from pyglow_fast.data.sources import load_data, load_digits
from pyglow_fast.data.yardsticks import (
    Yardstick,
    histogram_bits_per_dim,
    look_over,
    measure_yardsticks,
    png_bits_per_dim,
)

__all__ = [
    "DATA_HELP",
    "FETCHABLE",
    "SOURCES",
    "Attributes",
    "Augmentation",
    "Batch",
    "DataConfig",
    "FetchError",
    "Fetchable",
    "ImageSet",
    "Images",
    "LazyImages",
    "MissingExtraError",
    "UnreadableImageError",
    "Yardstick",
    "batches",
    "check_installed",
    "data_folder",
    "fetch",
    "from_dataset",
    "histogram_bits_per_dim",
    "load_data",
    "load_digits",
    "look_over",
    "measure_yardsticks",
    "optional",
    "png_bits_per_dim",
    "read_single",
    "split",
]
