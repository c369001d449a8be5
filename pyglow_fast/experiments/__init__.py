"""Experiments with trained models, or that train several: foreign images, ablations."""

from pyglow_fast.experiments.ablation import Ablation, Trial, variants
from pyglow_fast.experiments.ood import Auroc, auroc, typicality

__all__ = [
    "Ablation",
    "Auroc",
    "Trial",
    "auroc",
    "typicality",
    "variants",
]
