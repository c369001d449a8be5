"""Sets of images: subsets, the held-out split, training views, and the digest that a resumed run compares."""

from __future__ import annotations

from typing import Any

import torch

from pyglow_fast.data import Attributes, Augmentation, ImageSet, split


def images(n: int = 20, **fields: Any) -> ImageSet:
    pixels = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 4, 2).contiguous()
    return ImageSet("test", pixels, 256, **fields)


def test_a_subset_has_what_is_said_of_its_images() -> None:
    fields = {"labels": torch.tensor([0, 1, 0, 1, 1]), "class_names": ("a", "b"), "groups": tuple("vwxyz")}
    data = images(5, attributes=Attributes(("round",), torch.tensor([[1], [0], [0], [0], [1]]).bool()), **fields)
    assert (data.image_shape, data.n_dims, len(data)) == ((3, 4, 2), 24, 5)
    part = data.subset([4, 1])
    assert part.pixels[:, 0, 0, 0].tolist() == [4, 1]
    assert part.labels.tolist() == [1, 1]
    assert part.groups == ("z", "w")
    assert part.attributes.has.tolist() == [[True], [False]]


def test_split_is_a_partition_that_only_data_and_seed_decide() -> None:
    data = images(50)
    train, held_out = split(data, 0.2, seed=3)
    assert len(held_out) == 10
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(50))
    torch.manual_seed(999)  # the global generator has no say
    assert torch.equal(held_out, split(images(50), 0.2, seed=3)[1])
    assert not torch.equal(held_out, split(data, 0.2, seed=4)[1])


def test_groups_never_part() -> None:
    groups = tuple(f"photo{i // 5}" for i in range(30))
    train, held_out = split(images(30, groups=groups), 0.3, seed=1)
    assert len(held_out) == 10
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}
    # A large group leaves something to train on, whichever is drawn first.
    parts = [split(images(10, groups=("a",) * 9 + ("b",)), 0.9, seed) for seed in range(4)]
    assert {(len(train), len(held_out)) for train, held_out in parts} == {(1, 9), (9, 1)}


def test_nothing_drawn_changes_with_versions() -> None:
    """Written down: resumed runs would train on what they held out, or refuse images that are the same."""
    assert split(images(10), 0.3, seed=0)[1].tolist() == [1, 4, 7]
    ramp = torch.arange(81, dtype=torch.uint8).reshape(1, 9, 9)
    views = [Augmentation(8, True).view(ramp, key).flatten().tolist() for key in range(4)]
    assert views == [[66], [20], [60], [45]]
    labelled = images(4, labels=torch.tensor([0, 1, 0, 1]), class_names=("a", "b"), groups=tuple("vwxy"))
    assert labelled.fingerprint() == "41ccfdee550262be563b41a5fb878062"
    official = images(4, official=(torch.tensor([0]), torch.tensor([3])), augmentation=Augmentation(1, True))
    assert official.fingerprint() == "116026c5882c612e4f55d24cd980189d"
