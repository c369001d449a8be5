"""Experiments with trained models, or that train several: foreign images, ablations."""

from pyglow_fast.experiments.compare import Comparison, Trial, variants
from pyglow_fast.experiments.ood import Auroc, auroc, typicality

__all__ = [
    "Auroc",
    "Comparison",
    "Trial",
    "auroc",
    "typicality",
    "variants",
]
