"""Converts the flow part of checkpoints of SRFlow and of what derives from it (LLFlow).

The layers are ``flowUpsamplerNet.layers.i``: each level is a squeeze (which has no tensors), steps without a coupling,
steps with ``affine`` (``fFeatures``, the injector's net; ``fAffine``, the coupling's), and in the first levels a split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.interop.convert.files import Reader
from pyglow_fast.interop.convert.formats import port
from pyglow_fast.interop.convert.parts import check_model, parts_of, put_together
from pyglow_fast.interop.convert.table import Table
from pyglow_fast.models import Glow

_LAYERS = "flowUpsamplerNet.layers"


def _table() -> Table:
    """That of chaiyujin's, from which theirs is derived, with a second net, and without what they have not."""
    texts = (port(_LAYERS, f"affine.{net}", "", "", "", "", "") for net in ("fAffine", "fFeatures"))
    (_, step, split, _, _, plain, *_), (_, injector, *_) = (re.split(r"(?m)^(?=\w+:)", text) for text in texts)
    rows = [row.replace("coupling.", "injector.") for row in injector.splitlines() if row.startswith("coupling.")]
    return Table("\n".join([step, *rows, split, plain]))


_TABLE = _table()


def level_features(features: Mapping[str, Tensor], scale: int, n_levels: int) -> list[Tensor]:
    """Take the condition of each level, shallowest first, out of their encoder's dict.

    Level l (from 1) reads ``fea_up{2^n}``, n = log2(scale) - l; for n = -1 that is ``fea_up0``, for n = -2
    ``fea_up-1``. LLFlow's scale is 1, and its names are those of 4.

    Args:
        features: what their RRDB gives (``rrdbResults``), with the blocks concatenated.
        scale: of the super-resolution, 4, 8 or 16; 1 for LLFlow.
        n_levels: L.

    Raises:
        ValueError: another scale, a level for which they have no features, or one that is missing.
    """
    expect(scale in (1, 4, 8, 16), "scale", "1, 4, 8 or 16", scale)
    exponents = [int(math.log2(4 if scale == 1 else scale)) - level for level in range(1, n_levels + 1)]
    names = [f"fea_up{2**n if n >= 0 else n + 1}" for n in exponents]
    expect(exponents[-1] >= -2, "n_levels", f"levels that they have features for, down to {scale=}", n_levels)
    for name in names:
        expect(name in features, "features", f"a tensor {name!r}", sorted(features))
    return [features[name] for name in names]


def load_srflow(
    state: Mapping[str, Any] | str, image_size: int | tuple[int, int] = 160, scale_eps: float = 1e-4
) -> Glow:
    """Load the flow of their model: encode, decode and log_det of x in [0, 1] given the features of each level.

    The architecture is read off the names: levels by the layers without tensors, K and the number of steps without a
    coupling by ``affine``, widths by shapes. The encoder (``RRDB`` and whatever else is beside
    ``flowUpsamplerNet.layers``) is left out; give its features as :func:`level_features` picks them. Their log-det
    includes the density of what splits factor out, as log_prob does here. log_prob includes the density of the top
    latent too, N(0, 1), where LLFlow puts a mean of its own.

    Args:
        state: the state dict, or its file's path.
        image_size: side, or (H, W), of the images; :meth:`~pyglow_fast.Glow.resized` changes it.
        scale_eps: their ``eps``, which no tensor tells: scales are sigmoid(raw + 2) + eps.

    Raises:
        ValueError: a tensor that is missing, unknown or of the wrong shape, by name, such as those of 1x1 convolutions
            by LU factors, or of LLFlow's curves (``fCurve``).
    """
    reader = Reader(state)
    n_levels, n_transitions, n_steps, n_splits = _TABLE.layers(reader)
    layers = n_transitions + n_steps + 1
    starts = [level * layers + min(level, n_splits) + 1 for level in range(n_levels)]
    net = "flowUpsamplerNet.layers.{}.affine.fFeatures.0.weight"
    fields: dict[str, Any] = {"cond_channels": tuple(reader.size(net.format(i + n_transitions), 1) for i in starts)}
    if n_splits:
        split, bias = (f"flowUpsamplerNet.layers.{name}" for name in (f"{layers}.conv.weight", "1.actnorm.bias"))
        channels, factored = reader.size(bias, 1), reader.size(split, 0) // 2
        kept_and_cond = channels - factored + fields["cond_channels"][0]
        fields |= {"split_ratio": factored / channels, "cond_splits": reader.size(split, 1) == kept_and_cond}
    counts = {"n_levels": n_levels, "n_steps": n_steps, "n_transitions": n_transitions, "n_splits": n_splits}
    known = {"permutation": "invconv_plain", "net_actnorm": True, "injector": True, "learn_top": False}
    config = _TABLE.config(reader, image_size, scale_eps=scale_eps, **counts, **known, **fields)
    parts = _TABLE.read(config, reader)
    model = put_together(config, parts, reader.finish(left_out=r"(?!flowUpsamplerNet\.layers\.)"))
    model._range_is_known = True  # [0, 1], as in their code
    return model


def save_srflow(model: Glow) -> dict[str, Tensor]:
    """Write a flow as the tensors ``flowUpsamplerNet.layers.*`` of their model; the encoder's stay theirs.

    Args:
        model: a Glow of the interface that the presets "srflow4x", "srflow8x" and "llflow" have, initialised.

    Raises:
        ValueError: another interface, a frozen model, or actnorms that have seen no data.
    """
    wanted = {"injector": True, "coupling": "affine", "permutation": "invconv_plain", "net_actnorm": True}
    wanted |= {"border": False, "n_classes": None, "learn_top": False, "classify": 0, "dims": 2}
    wanted |= {"scale_map": "sigmoid", "scale_bias": 2.0}
    check_model(model, {name: (value, ", as they have it") for name, value in wanted.items()})
    learned = model.config.learn_prior or not model.config.splits
    expect(learned, "learn_prior", "True, as their splits have it", False)
    return _TABLE.write(model, parts_of(model))
