"""Measuring what a model still can do, by procedures whose figures are comparable with published ones."""

from axicon.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
