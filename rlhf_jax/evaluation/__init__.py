"""Measures of trained models: distances between completions, memorization of planted secrets, best-of-n, intervals."""

from rlhf_jax.evaluation.best_of_n import best_of_n_estimate as best_of_n_estimate
from rlhf_jax.evaluation.best_of_n import best_of_n_kl as best_of_n_kl
from rlhf_jax.evaluation.distances import edit_distance as edit_distance
from rlhf_jax.evaluation.distances import normalized_edit_distance as normalized_edit_distance
from rlhf_jax.evaluation.intervals import mean_interval as mean_interval
from rlhf_jax.evaluation.intervals import newcombe_difference as newcombe_difference
from rlhf_jax.evaluation.intervals import wilson as wilson
from rlhf_jax.evaluation.memorization import MEMORIZED_DISTANCE as MEMORIZED_DISTANCE
from rlhf_jax.evaluation.memorization import memorization_table as memorization_table
from rlhf_jax.evaluation.memorization import persistence as persistence
