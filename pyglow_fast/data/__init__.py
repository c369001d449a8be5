"""Loads the images to train on, splits off what is held out, makes batches and measures yardsticks.

It imports torch and data libraries only.
"""

from pyglow_fast.data._optional import MissingExtraError, check_installed, optional
from pyglow_fast.data.augment import Augmentation
from pyglow_fast.data.cache import data_folder
from pyglow_fast.data.celeba import load_celeba
from pyglow_fast.data.cifar import load_cifar10
from pyglow_fast.data.dataset import from_dataset
from pyglow_fast.data.decode import UnreadableImageError
from pyglow_fast.data.digits import load_digits
from pyglow_fast.data.emoji import TonePair, emoji_tone_pairs, load_emoji
from pyglow_fast.data.fetch import FETCHABLE, Fetchable, FetchError, fetch
from pyglow_fast.data.folder import load_folder
from pyglow_fast.data.idx import load_idx
from pyglow_fast.data.image_set import Attributes, Images, ImageSet, split
from pyglow_fast.data.imagenet import load_imagenet
from pyglow_fast.data.lazy import LazyImages
from pyglow_fast.data.loader import Batch, batches
from pyglow_fast.data.lsun import load_lsun
from pyglow_fast.data.photos import load_photos
from pyglow_fast.data.prepare import Preparation
from pyglow_fast.data.single import read_single
from pyglow_fast.data.sources import DATA_HELP, DataConfig, load_data, options_of
from pyglow_fast.data.yardsticks import Yardstick, histogram_bits_per_dim, measure_yardsticks, png_bits_per_dim

__all__ = [
    "DATA_HELP",
    "FETCHABLE",
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
    "Preparation",
    "TonePair",
    "UnreadableImageError",
    "Yardstick",
    "batches",
    "check_installed",
    "data_folder",
    "emoji_tone_pairs",
    "fetch",
    "from_dataset",
    "histogram_bits_per_dim",
    "load_celeba",
    "load_cifar10",
    "load_data",
    "load_digits",
    "load_emoji",
    "load_folder",
    "load_idx",
    "load_imagenet",
    "load_lsun",
    "load_photos",
    "measure_yardsticks",
    "optional",
    "options_of",
    "png_bits_per_dim",
    "read_single",
    "split",
]
