"""Experiments with trained models, or that train several: likelihoods image by image, foreign images, ablations."""

from pyglow_fast.experiments.compare import Comparison, Trial, variants
from pyglow_fast.experiments.ood import Auroc, auroc, save_histogram, typicality
from pyglow_fast.experiments.outcomes import Outcome
from pyglow_fast.experiments.scores import ScoredImages, score_csv, write_scores

__all__ = [
    "Auroc",
    "Comparison",
    "Outcome",
    "ScoredImages",
    "Trial",
    "auroc",
    "save_histogram",
    "score_csv",
    "typicality",
    "variants",
    "write_scores",
]
