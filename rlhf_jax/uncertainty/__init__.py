"""Bayesian scorers: a Gaussian over a reward or cost model's adapters and head (Laplace-LoRA, arXiv 2308.13111)."""

from rlhf_jax.uncertainty.posterior import Posterior
from rlhf_jax.uncertainty.predictive import difference_moments, relative_moments, score_moments

__all__ = ["Posterior", "difference_moments", "relative_moments", "score_moments"]
