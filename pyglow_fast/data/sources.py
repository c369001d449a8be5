"""Loads the images that a DataConfig names: small sets by themselves, the usual ones by torchvision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core.errors import expect, visible
from pyglow_fast.data._optional import optional
from pyglow_fast.data.config import SOURCES, DataConfig
from pyglow_fast.data.fetch import IDX_FILES, data_folder
from pyglow_fast.data.files import UnreadableImageError, check_folder, decode, find_images, fixed_size, padded, pixels
from pyglow_fast.data.image_set import Attributes, Images, ImageSet
from pyglow_fast.data.lazy import from_files

SHIPPED = Path(__file__).parent.parent / "shown"  # the small model that comes with the package, and its images
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
# Pictures of the package budgie-backgrounds that are no photographs: a woodblock print, a planet on plain black, and
# two drawings of plain areas.
NOT_PHOTOS = frozenset({"ocean-waves.jpg", "saturnian-profile.jpg", "valley-midnight.jpg", "waves-midnight.jpg"})
_MNIST = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def load_digits(config: DataConfig | None = None) -> ImageSet:
    """Loads scikit-learn's handwritten digits: an ImageSet of shape (1797, 1, 8, 8) with n_bins=17 and ten classes."""
    config = config or DataConfig("digits")
    bunch = optional("sklearn.datasets", "the digits").load_digits()
    values = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    names = tuple(str(name) for name in bunch.target_names)
    return ImageSet("digits", padded(values, config.side), 17, labels, names, augmentation=config.augmentation)


def load_emoji_small(config: DataConfig) -> ImageSet:
    """Loads the 2,566 Noto emoji of 32x32 that come with the package (Apache-2.0); shown/README.md tells more."""
    listed = json.loads((SHIPPED / "images.json").read_text(encoding="utf-8"))
    count, sheet = len(listed["classes"]), pixels(decode(SHIPPED / "images.png", "images.png", gray=False))
    values = fixed_size(_cut(sheet, listed["size"])[:count], config)
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
    """Loads tiles of all photos in a folder, shrunk by config.scale, into memory; those of one photo are a group."""
    check_folder(root, "photos")
    paths = [path for path in find_images(root) if path.name not in NOT_PHOTOS]
    expect(len(paths) > 0, "photos", "a folder with photos", f"none in {str(root)!r}")
    size = config.side - config.crop_margin
    scale = config.scale or (4 if size <= 64 else 2 if size <= 256 else 1)
    parts = [_tiles(path, config.side, scale, config.gray) for path in paths]
    groups = tuple(path.relative_to(root).as_posix() for path, part in zip(paths, parts, strict=True) for _ in part)
    values = torch.cat(parts) >> (9 - config.n_bins.bit_length())
    return ImageSet("photos", values, config.n_bins, groups=groups, augmentation=config.augmentation)


def _tiles(path: Path, side: int, scale: int, gray: bool) -> Tensor:
    """uint8 (n, C, side, side), row by row."""
    image = decode(path, str(path), gray)
    width, height = image.width // scale, image.height // scale
    if min(width, height) < side:
        needed, found = side * scale, f"{image.width}x{image.height}"
        raise UnreadableImageError(f"{path}: expected an image of at least {needed}x{needed}, found {found}")
    return _cut(pixels(image.crop((0, 0, width * scale, height * scale)).reduce(scale)), side)


def _cut(sheet: Tensor, side: int) -> Tensor:
    """The squares of a picture (C, H, W), row by row: (n, C, side, side)."""
    down, across = sheet.shape[1] // side, sheet.shape[2] // side
    values = sheet[:, : down * side, : across * side].reshape(-1, down, side, across, side)
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
    """One key an image: the emoji, or the first emoji with the same picture (some flags, the families)."""
    first: dict[bytes, str] = {}
    keys: dict[str, str] = {}
    for picture in pictures:
        if picture.emoji not in keys:  # before its skin tones
            digest = hashlib.sha256((root / picture.file).read_bytes()).digest()
            keys[picture.emoji] = first.setdefault(digest, picture.emoji)
    return tuple(keys[picture.emoji] for picture in pictures)


def load_emoji(config: DataConfig, root: Path) -> Images:
    """Loads emoji and their skin tones on white, labelled by category, from emoji.json and img/VENDOR/64/*.png."""
    pictures = _pictures(root)
    labels, class_names = numbered([picture.category for picture in pictures])
    shown = [set(picture.tones.split("-")) for picture in pictures]
    has = torch.tensor([[tones == {code} for code in TONES] for tones in shown])
    attributes = Attributes(tuple(f"skin tone {tone}" for tone in TONES.values()), has)
    facts = {"labels": labels, "class_names": class_names, "attributes": attributes, "groups": _groups(root, pictures)}
    return from_files(config.scheme, root, [picture.file for picture in pictures], config, **facts)


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


def _of_fixed_size(
    name: str, images: Sequence[Tensor], labels: Sequence[Tensor], class_names: Sequence[str], config: DataConfig
) -> ImageSet:
    """A set of training and test images (N, C, H, W) with their labels."""
    values = fixed_size(torch.cat([*images]).contiguous(), config)
    known = torch.cat([*labels]), tuple(class_names)
    official = torch.arange(len(images[0])), torch.arange(len(images[0]), len(values))
    return ImageSet(name, values, config.n_bins, *known, (), official, config.augmentation)


def numbered(names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Numbers the class of each image: (labels (N,), class names sorted)."""
    class_names = tuple(sorted(set(names)))
    number = {name: i for i, name in enumerate(class_names)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64), class_names


def load_mnist(config: DataConfig, root: Path) -> Images:
    """Loads MNIST or Fashion-MNIST from a folder with its four files, unpacked, or the one torchvision put them in."""
    name = config.scheme
    folder = root / _MNIST[name] / "raw"
    folder = folder if folder.is_dir() else root
    with _torchvision(name, root) as datasets:
        images = [datasets.mnist.read_image_file(str(folder / file)) for file in IDX_FILES[::2]]
        labels = [datasets.mnist.read_label_file(str(folder / file)) for file in IDX_FILES[1::2]]
        names = [word.partition(" - ")[0] for word in getattr(datasets, _MNIST[name]).classes]
    return _of_fixed_size(name, [part.unsqueeze(1) for part in images], labels, names, config)


def load_cifar10(config: DataConfig, root: Path) -> Images:
    """Loads CIFAR-10 from the folder ``cifar-10-batches-py`` or the one it lies in."""
    top = root.parent if root.resolve().name == "cifar-10-batches-py" else root
    with _torchvision("cifar10", root) as datasets:  # it unpickles files, after a look at their MD5
        parts = [datasets.CIFAR10(top, is_train) for is_train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    return _of_fixed_size("cifar10", images, [torch.tensor(part.targets) for part in parts], parts[0].classes, config)


def load_celeba(config: DataConfig, root: Path) -> Images:
    """Loads CelebA from ``celeba`` or the folder it lies in; config.attribute makes two classes of it."""
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
    official = torch.arange(counts[0]), torch.arange(counts[0], len(names))
    return from_files("imagenet", root, names, config, labels=labels, class_names=class_names, official=official)


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
    "folder": load_folder,
}


def load_data(config: DataConfig) -> Images:
    """Load the images that ``config`` names; its errors are those of the source, and each names what is wrong."""
    name, _, path = config.name.partition(":")
    root = Path(path)
    if SOURCES[name].path == "optional" and not path:
        root = data_folder() / name
        wanted = f"its files in {str(root)!r} (run: pyglow-fast data {name}) or {name}:PATH"
        expect(root.is_dir(), name, wanted, "none")
    return _LOADERS[name](config, root)
