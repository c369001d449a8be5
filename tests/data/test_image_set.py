"""ImageSet and the held-out split."""

from __future__ import annotations

from typing import Any

import torch

from pyglow_fast.data import ImageSet, split


def images(n: int = 20, **fields: Any) -> ImageSet:
    pixels = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 4, 2).contiguous()
    return ImageSet("test", pixels, 256, **fields)


def test_shape_and_subset() -> None:
    data = images(5, labels=torch.tensor([0, 1, 0, 1, 1]), class_names=("a", "b"), groups=tuple("vwxyz"))
    assert (data.image_shape, data.n_dims, len(data)) == ((3, 4, 2), 24, 5)
    part = data.subset([4, 1])
    assert part.pixels[:, 0, 0, 0].tolist() == [4, 1]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 1]
    assert part.groups == ("z", "w")
    pixels, labels = data.batch(torch.tensor([2]))
    assert pixels[0, 0, 0, 0] == 2
    assert labels is not None
    assert labels.tolist() == [0]


def test_split_is_a_partition_that_only_data_and_seed_decide() -> None:
    data = images(50)
    train, held_out = split(data, 0.2, seed=3)
    assert len(held_out) == 10
    assert torch.cat([train, held_out]).sort().values.tolist() == list(range(50))
    torch.manual_seed(999)  # the global generator has no say
    again = split(images(50), 0.2, seed=3)
    assert torch.equal(train, again[0])
    assert torch.equal(held_out, again[1])
    assert not torch.equal(held_out, split(data, 0.2, seed=4)[1])


def test_split_does_not_change_with_versions() -> None:
    """Written down, so that a change of the drawing is noticed: resumed runs would train on what they held out."""
    assert split(images(10), 0.3, seed=0)[1].tolist() == [1, 4, 7]


def test_groups_never_part() -> None:
    groups = tuple(f"photo{i // 5}" for i in range(30))
    data = images(30, groups=groups)
    train, held_out = split(data, 0.3, seed=1)
    assert len(held_out) == 10
    assert not {groups[i] for i in train} & {groups[i] for i in held_out}


def test_a_large_group_leaves_something_to_train_on() -> None:
    """Whichever is drawn first."""
    sizes = set()
    for seed in range(4):
        train, held_out = split(images(10, groups=("a",) * 9 + ("b",)), 0.9, seed)
        sizes.add((len(train), len(held_out)))
    assert sizes == {(1, 9), (9, 1)}


def test_fingerprint_sees_every_part() -> None:
    base = images(6, labels=torch.zeros(6, dtype=torch.int64), class_names=("a", "b"))
    same = images(6, labels=torch.zeros(6, dtype=torch.int64), class_names=("a", "b"))
    assert base.fingerprint() == same.fingerprint()
    changed_level = base.pixels.clone()
    changed_level[3, 2, 1, 0] += 1
    others = [
        ImageSet("test", changed_level, 256, base.labels, base.class_names),
        ImageSet("test", base.pixels, 255, base.labels, base.class_names),
        ImageSet("test", base.pixels.reshape(6, 3, 2, 4), 256, base.labels, base.class_names),
        ImageSet("test", base.pixels, 256, torch.tensor([0, 0, 0, 1, 0, 0]), base.class_names),
        ImageSet("test", base.pixels, 256, base.labels, base.class_names, tuple("abcdef")),
        base.subset([1, 0, 2, 3, 4, 5]),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(others)
