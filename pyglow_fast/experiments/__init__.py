"""Experiments with trained models, or that train several: likelihoods image by image, foreign images, ablations."""

from pyglow_fast.experiments.compare import Comparison, Trial, variants
from pyglow_fast.experiments.ood import Auroc, auroc, histogram_png, typicality
from pyglow_fast.experiments.scores import ScoredImages, score_csv, write_scores

__all__ = [
    "Auroc",
    "Comparison",
    "ScoredImages",
    "Trial",
    "auroc",
    "histogram_png",
    "score_csv",
    "typicality",
    "variants",
    "write_scores",
]
