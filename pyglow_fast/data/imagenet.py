"""Reads ImageNet, or anything laid out like it: train/CLASS/FILE and val/CLASS/FILE.

torchvision's own class wants an archive of the authors' beside the images, and SciPy to read it; it unpacks archives
without a look at the names in them, and passes over subfolders that cannot be listed.
"""

from __future__ import annotations

from pathlib import Path

from pyglow_fast._errors import expect
from pyglow_fast.data.decode import find_images
from pyglow_fast.data.folder import check_folder, numbered
from pyglow_fast.data.idx import train_first
from pyglow_fast.data.image_set import Images
from pyglow_fast.data.lazy import Listing, from_files
from pyglow_fast.data.prepare import Preparation


def load_imagenet(root: Path, preparation: Preparation) -> Images:
    """Loads the images of ``train`` and ``val``, which are the official split, labelled by the folders in them.

    Args:
        root: the folder that has both.
        preparation: how the files are prepared.

    Raises:
        ValueError: a folder is missing, empty or cannot be listed, an image lies in no class folder, or val has a class
            train has not.
    """
    names: list[str] = []
    classes: list[str] = []
    counts = []
    for part in ("train", "val"):
        check_folder(root / part, "imagenet")
        found = [path.relative_to(root).parts for path in find_images(root / part, preparation.on_unreadable)]
        expect(len(found) > 0, "imagenet", f"images in {str(root / part)!r}", "none")
        for parts in found:
            expect(len(parts) > 2, "imagenet", f"images in class folders of {str(root / part)!r}", "/".join(parts))
        names += ["/".join(parts) for parts in found]
        classes += [parts[1] for parts in found]
        counts.append(len(found))
    unknown = sorted(set(classes[counts[0] :]) - set(classes[: counts[0]]))
    expect(not unknown, "imagenet", "only classes of train in val", ", ".join(unknown[:5]))
    labels, class_names = numbered(classes)
    listing = Listing(labels, class_names, official=train_first(counts[0], sum(counts)))
    return from_files("imagenet", root, names, preparation, listing)
