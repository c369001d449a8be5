"""Loads the images that a DataConfig names: small sets by themselves, the usual ones by torchvision, LSUN by lmdb."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyglow_fast._errors import expect, visible
from pyglow_fast.data._optional import optional
from pyglow_fast.data.config import SOURCES, DataConfig
from pyglow_fast.data.fetch import IDX_FILES, cached
from pyglow_fast.data.files import (
    UnreadableImageError,
    check_folder,
    decode,
    find_images,
    fixed_size,
    padded,
    pixels,
    read_image,
)
from pyglow_fast.data.image_set import Attributes, Images, ImageSet
from pyglow_fast.data.lazy import from_files, images_of

__all__ = ["SHIPPED", "SOURCES", "TONES", "load_data", "load_digits"]

SHIPPED = Path(__file__).parent.parent / "shown"  # the small model that comes with the package, and its images
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Pictures of the package budgie-backgrounds that are no photographs: a woodblock print, a planet on plain black, and
# two drawings of plain areas.
NOT_PHOTOS = frozenset({"ocean-waves.jpg", "saturnian-profile.jpg", "valley-midnight.jpg", "waves-midnight.jpg"})
_MNIST = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
_TRAIN, _VAL = "_train_lmdb", "_val_lmdb"


def load_digits(config: DataConfig | None = None) -> ImageSet:
    """Loads scikit-learn's handwritten digits: an ImageSet of shape (1797, 1, 8, 8) with n_bins=17 and ten classes."""
    config = config or DataConfig("digits")
    bunch = optional("sklearn.datasets", "the digits").load_digits()
    values = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    names = tuple(str(name) for name in bunch.target_names)
    return ImageSet("digits", padded(values, config.side), 17, labels, names, augmentation=config.augmentation)


def load_emoji_small(config: DataConfig) -> ImageSet:
    """Loads the 2,590 Noto emoji of 32x32 that come with the package (Apache-2.0), with their classes and attributes.

    They are faces, hands and heads of people in six skin tones, each on two of six grounds; shown/README.md tells more.
    """
    listed = json.loads((SHIPPED / "images.json").read_text(encoding="utf-8"))
    sheet, side = pixels(decode(SHIPPED / "images.png", "images.png", gray=False)), listed["size"]
    tiles = sheet.reshape(3, sheet.shape[1] // side, side, sheet.shape[2] // side, side)
    count = len(listed["classes"])
    values = fixed_size(tiles.permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)[:count].contiguous(), config)
    labels, class_names = numbered(listed["classes"])
    has = torch.zeros(count, len(listed["attributes"]), dtype=torch.bool)
    for i, images in enumerate(listed["attributes"].values()):
        has[images, i] = True
    attributes = Attributes(tuple(listed["attributes"]), has)
    groups, views = tuple(listed["groups"]), config.augmentation
    return ImageSet("emoji-small", values, config.n_bins, labels, class_names, groups, None, views, attributes)


def load_folder(config: DataConfig, root: Path) -> Images:
    """Loads all images below a folder; its subfolders are the classes, where every image lies in one of several."""
    check_folder(root, "folder")
    parts = [path.relative_to(root).parts for path in find_images(root)]
    expect(len(parts) > 0, "folder", "a folder with images that Pillow reads", f"none in {str(root)!r}")
    by_file = config.split_by == "file"
    facts: dict[str, Any] = {"groups": tuple("/".join(part if by_file else part[:-1]) for part in parts)}
    tops = [part[0] for part in parts]
    if min(map(len, parts)) > 1 and len(set(tops)) > 1:
        facts["labels"], facts["class_names"] = numbered(tops)
    return from_files(f"folder:{root}", root, ["/".join(part) for part in parts], config, **facts)


def load_photos(config: DataConfig, root: Path) -> ImageSet:
    """Loads tiles of all photos in a folder, into memory; they do not overlap, and those of one photo are a group.

    Photos are shrunk first, by config.scale: small tiles of a large photo would show little but smooth areas.
    """
    check_folder(root, "photos")
    paths = [path for path in find_images(root) if path.name not in NOT_PHOTOS]
    expect(len(paths) > 0, "photos", "a folder with photos", f"none in {str(root)!r}")
    size = config.side - config.crop_margin
    scale = config.scale or (4 if size <= 64 else 2 if size <= 256 else 1)
    parts = [_tiles(path, config.side, scale, config.gray) for path in paths]
    names = (path.relative_to(root).as_posix() for path in paths)
    groups = tuple(name for name, part in zip(names, parts, strict=True) for _ in part)
    values = torch.cat(parts) >> (9 - config.n_bins.bit_length())
    return ImageSet("photos", values, config.n_bins, groups=groups, augmentation=config.augmentation)


def _tiles(path: Path, side: int, scale: int, gray: bool) -> Tensor:
    """uint8 (n, C, side, side), row by row."""
    image = decode(path, str(path), gray)
    width, height = image.width // scale, image.height // scale
    across, down = width // side, height // side
    if across * down == 0:
        needed, found = side * scale, f"{image.width}x{image.height}"
        raise UnreadableImageError(f"{path}: expected an image of at least {needed}x{needed}, found {found}")
    values = pixels(image.crop((0, 0, width * scale, height * scale)).reduce(scale))
    values = values[:, : down * side, : across * side].reshape(-1, down, side, across, side)
    return values.permute(1, 3, 0, 2, 4).reshape(down * across, -1, side, side)


class _Picture(NamedTuple):
    file: str  # relative to the folder of the set
    emoji: str  # its short name, which no other emoji has
    category: str
    tones: str  # code points of the tones joined by "-"; empty for the emoji itself


def _pictures(root: Path) -> list[_Picture]:
    """Every picture that is there, in the order of the list; an emoji comes before its variants."""
    check_folder(root, "emoji")
    path = root / "emoji.json"
    expect(path.is_file(), "emoji", f"the file {path}", "none")
    folders = sorted(folder for folder in root.glob("img/*/64") if folder.is_dir())
    expect(len(folders) == 1, "emoji", f"one folder {root / 'img' / '*' / '64'}", len(folders))
    present = {file.name for file in folders[0].iterdir()}
    inside = folders[0].relative_to(root).as_posix()
    found = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8")):
            for tones, item in {"": entry, **entry.get("skin_variations", {})}.items():
                if item["image"] in present:  # only then, so that a name cannot lead out of the folder
                    file = f"{inside}/{item['image']}"
                    found.append(_Picture(file, str(entry["short_name"]), str(entry["category"]), tones))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"{path}: expected the list of an emoji-datasource package, found {type(error).__name__}: {error}"
        raise ValueError(visible(text)) from error
    expect(len(found) > 0, "emoji", f"the pictures that {path} names in {folders[0]}", "none of them")
    return found


def _groups(root: Path, pictures: list[_Picture]) -> tuple[str, ...]:
    """One key an image: the emoji, or the first emoji that shares a picture with it (some flags, the families)."""
    shown: dict[str, list[bytes]] = {}
    for picture in pictures:
        shown.setdefault(picture.emoji, []).append(hashlib.sha256((root / picture.file).read_bytes()).digest())
    key: dict[str, str] = {}
    owner: dict[bytes, str] = {}
    for emoji in sorted(shown):
        key[emoji] = min((owner[digest] for digest in shown[emoji] if digest in owner), default=emoji)
        for digest in shown[emoji]:
            owner.setdefault(digest, key[emoji])
    return tuple(key[picture.emoji] for picture in pictures)


def load_emoji(config: DataConfig, root: Path) -> Images:
    """Loads emoji and their skin tones on white, labelled by category, from emoji.json and img/VENDOR/64/*.png.

    Attributes say which pictures show all their people in one skin tone; those of no tone are yellow, or no people.
    """
    pictures = _pictures(root)
    labels, class_names = numbered([picture.category for picture in pictures])
    shown = [set(picture.tones.split("-")) for picture in pictures]
    has = torch.tensor([[tones == {code} for code in TONES] for tones in shown])
    attributes = Attributes(tuple(f"skin tone {tone}" for tone in TONES.values()), has)
    facts = {"labels": labels, "class_names": class_names, "attributes": attributes, "groups": _groups(root, pictures)}
    return from_files(config.name.partition(":")[0], root, [picture.file for picture in pictures], config, **facts)


@contextmanager
def _torchvision(name: str, root: Path) -> Iterator[Any]:
    """Gives torchvision.datasets to read files with; its errors are of many kinds and have several lines."""
    check_folder(root, name)
    datasets = optional("torchvision.datasets", name)
    try:
        yield datasets
    except Exception as error:
        said = str(error).partition("\n")[0].partition(". You can use")[0] or type(error).__name__
        text = f"{name}: expected a whole copy that torchvision reads in {str(root)!r}, found {said}"
        raise ValueError(visible(text)) from error


def _train_first(n_train: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n_train), torch.arange(n_train, count)


def numbered(names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers the class of each image: (labels (N,), class names sorted)."""
    class_names = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(class_names)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64), class_names


def load_mnist(config: DataConfig, root: Path) -> Images:
    """Loads MNIST or Fashion-MNIST from a folder with its four files, unpacked, or the one torchvision put them in."""
    name = config.name.partition(":")[0]
    folder = root / _MNIST[name] / "raw"
    folder = folder if folder.is_dir() else root
    with _torchvision(name, root) as datasets:
        images, labels = (
            [read(str(folder / file)) for file in files]
            for read, files in (
                (datasets.mnist.read_image_file, IDX_FILES[::2]),
                (datasets.mnist.read_label_file, IDX_FILES[1::2]),
            )
        )
        names = tuple(word.partition(" - ")[0] for word in getattr(datasets, _MNIST[name]).classes)
    pixels = fixed_size(torch.cat(images).unsqueeze(1), config)
    official = _train_first(len(images[0]), len(pixels))
    return ImageSet(name, pixels, config.n_bins, torch.cat(labels), names, (), official, config.augmentation)


def load_cifar10(config: DataConfig, root: Path) -> Images:
    """Loads CIFAR-10 from the folder ``cifar-10-batches-py`` or the one it lies in."""
    top = root.parent if root.resolve().name == "cifar-10-batches-py" else root
    with _torchvision("cifar10", root) as datasets:  # it unpickles files, after a look at their MD5
        train, test = (datasets.CIFAR10(top, is_train) for is_train in (True, False))
    values = torch.cat([torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)])
    labels = torch.tensor([*train.targets, *test.targets])
    official, names = _train_first(len(train.targets), len(labels)), tuple(train.classes)
    pixels = fixed_size(values.contiguous(), config)
    return ImageSet("cifar10", pixels, config.n_bins, labels, names, (), official, config.augmentation)


def load_celeba(config: DataConfig, root: Path) -> Images:
    """Loads CelebA from the folder ``celeba`` or the one it lies in; the valid part is on neither side of its split.

    All attributes go with the images; config.attribute makes the classes "not NAME" and "NAME".
    """
    top = root if (root / "celeba").is_dir() else root.parent
    with _torchvision("celeba", root) as datasets:
        parts = [datasets.CelebA(top, part) for part in ("train", "valid", "test")]
    names = [str(name) for part in parts for name in part.filename]
    known = tuple(name for name in parts[0].attr_names if name)
    has = torch.cat([part.attr for part in parts]).bool()
    first, second = len(parts[0].filename), len(parts[1].filename)
    official = torch.arange(first), torch.arange(first + second, len(names))
    facts: dict[str, Any] = {"official": official, "attributes": Attributes(known, has)}
    wanted = config.attribute
    if wanted is not None:
        expect(wanted in known, "attribute", f"one of {', '.join(known)}", repr(wanted))
        facts |= {"labels": has[:, known.index(wanted)].long(), "class_names": (f"not {wanted}", wanted)}
    return from_files("celeba", top / "celeba" / "img_align_celeba", names, config, **facts)


def load_imagenet(config: DataConfig, root: Path) -> Images:
    """Loads ImageNet, or anything laid out like it: train/CLASS/FILE and val/CLASS/FILE, the official split."""
    names: list[str] = []
    counts = []
    for part in ("train", "val"):
        with _torchvision("imagenet", root / part) as datasets:
            samples = datasets.ImageFolder(root / part).samples
        names += [Path(path).relative_to(root).as_posix() for path, _ in samples]
        counts.append(len(samples))
    labels, class_names = numbered([name.split("/")[1] for name in names])
    unknown = set(labels[counts[0] :].tolist()) - set(labels[: counts[0]].tolist())
    expect(not unknown, "imagenet", "only classes of train in val", ", ".join(class_names[i] for i in sorted(unknown)))
    official = _train_first(counts[0], len(names))
    return from_files("imagenet", root, names, config, labels=labels, class_names=class_names, official=official)


@dataclass(frozen=True)
class _LmdbReader:
    """The images of several databases; each is opened for one reading, since a process may have it open but once."""

    paths: Sequence[Path]
    keys: Any  # one array of bytes: the number of an image's database in one byte, and its key there
    side: int
    gray: bool

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Tensor:
        path, key = self.paths[self.keys[index][0]], bytes(self.keys[index][1:])
        where = f"{path}: {key.decode('ascii', 'replace')}"
        with _opened(path) as database, database.begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise UnreadableImageError(f"{where}: expected an image, found no such key any more")
        return read_image(value, self.side, self.gray, where)

    def identity(self) -> str:
        """Makes a digest of the names and sizes of the databases and all their keys."""
        sizes = [(path.name, (path / "data.mdb").stat().st_size) for path in self.paths]
        return hashlib.sha256(f"{sizes}".encode() + self.keys.tobytes()).hexdigest()


def _opened(path: Path) -> Any:
    lmdb = optional("lmdb", "LSUN")
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise ValueError(visible(f"{path}: expected an LMDB, found {error}")) from error


def load_lsun(config: DataConfig, root: Path) -> Images:
    """Loads LSUN: all CATEGORY_train_lmdb in a folder, or one of them; several categories are the classes.

    Where every category has a CATEGORY_val_lmdb beside it, these are the official split.
    """
    check_folder(root, "lsun")
    trains = [root] if root.name.endswith(_TRAIN) else sorted(root.glob(f"*{_TRAIN}"))
    expect(len(trains) > 0, "lsun", f"a folder with CATEGORY{_TRAIN}", f"none in {str(root)!r}")
    vals = [path.with_name(path.name.removesuffix(_TRAIN) + _VAL) for path in trains]
    has_split = all(path.is_dir() for path in vals)
    paths = [*trains, *(vals if has_split else ())]
    keys: list[bytes] = []
    for which, path in enumerate(paths):
        with _opened(path) as database, database.begin() as transaction:
            keys += [bytes([which]) + key for key in transaction.cursor().iternext(keys=True, values=False)]
    facts: dict[str, Any] = {}
    if has_split:
        facts["official"] = _train_first(sum(key[0] < len(trains) for key in keys), len(keys))
    if len(trains) > 1:
        categories = [path.name.removesuffix(_TRAIN).removesuffix(_VAL) for path in paths]
        facts["labels"], facts["class_names"] = numbered([categories[key[0]] for key in keys])
    reader = _LmdbReader(paths, np.array(keys), config.side, config.gray)
    return images_of("lsun", reader, config, (1 if config.gray else 3, config.side, config.side), **facts)


# A new source is a row here, and one of config.SOURCES.
_LOADERS: dict[str, Callable[[DataConfig, Path], Images]] = {
    "digits": lambda config, path: load_digits(config),
    "emoji-small": lambda config, path: load_emoji_small(config),
    "mnist": load_mnist,
    "fashion-mnist": load_mnist,
    "emoji": load_emoji,
    "emoji-google": load_emoji,
    "photos": load_photos,
    "cifar10": load_cifar10,
    "celeba": load_celeba,
    "imagenet": load_imagenet,
    "lsun": load_lsun,
    "folder": load_folder,
}


def load_data(config: DataConfig) -> Images:
    """Load the images that ``config`` names; its errors are those of the source, and each names what is wrong."""
    scheme, _, path = config.name.partition(":")
    fetched = SOURCES[scheme].path == "optional" and not path
    return _LOADERS[scheme](config, cached(scheme) if fetched else Path(path))
