"""Experiments with trained models, or that train several: foreign images, comparisons, ablations.

Read compare.py first. The folder may import studio, and every folder outside app.
"""

from pyglow_fast.app.experiments.ablation import Ablation, Trial, variants
from pyglow_fast.app.experiments.compare import caveat, comparison_page, run_table
from pyglow_fast.app.experiments.ood import auroc, typicality

__all__ = [
    "Ablation",
    "Trial",
    "auroc",
    "caveat",
    "comparison_page",
    "run_table",
    "typicality",
    "variants",
]
