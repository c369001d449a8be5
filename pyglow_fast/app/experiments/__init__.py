"""Experiments with trained models, or that train several: foreign images, comparisons, ablations.

Read compare.py first. The folder may import studio, and every folder outside app.
"""
