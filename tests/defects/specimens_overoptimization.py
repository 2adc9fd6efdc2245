"""Defects of best-of-n by ensembles, which break a truth."""

from typing import Any

import numpy as np
import truths_overoptimization as truths
from harness import Patches, Specimen

from rlhf_jax.evaluation import overoptimization as laboratory
from rlhf_jax.objectives import adjustment
from rlhf_jax.objectives.adjustment import Moments


def gold_in_the_first_order(patch: Patches) -> None:
    """Proxy scores and answers are sorted anew for each member; gold stays as the first one sorted it."""
    orders: list[np.ndarray] = []

    def wrapper(right: Any) -> Any:
        def best_of_n(self: Any, values: Any, numbers: Any) -> Any:
            own = self._order
            orders.append(own)
            self._order = orders[0]
            found = right(self, values, numbers)
            self._order = own
            return found

        return best_of_n

    patch.wrap(laboratory.Ranked, "best_of_n", wrapper)


def gold_unsorted(patch: Patches) -> None:
    def wrapper(right: Any) -> Any:
        def best_of_n(self: Any, values: Any, numbers: Any) -> Any:
            own, self._order = self._order, np.broadcast_to(np.arange(values.shape[-1]), values.shape)
            found = right(self, values, numbers)
            self._order = own
            return found

        return best_of_n

    patch.wrap(laboratory.Ranked, "best_of_n", wrapper)


def variance_of_a_sample(patch: Patches) -> None:
    """Divided by one member less: a penalty that is a quarter larger of five members than where it was tuned."""

    def wrapper(right: Any) -> Any:
        def mixture(means: Any, variances: Any = None) -> Moments:
            found = right(means, variances)
            return found._replace(variance=found.variance * len(means) / (len(means) - 1))

        return mixture

    patch.wrap(adjustment, "mixture", wrapper)


def zero_is_no_weight(patch: Patches) -> None:
    """`k or 1.0`."""

    def wrapper(right: Any) -> Any:
        return lambda moments, kind, k, sign=1.0: right(moments, kind, k or 1.0, sign)

    patch.wrap(laboratory, "adjusted", wrapper)


ENSEMBLES = "Coste et al.'s released code"
GOLD = truths.gold_is_that_of_the_chosen_answer, "gold is not that of the answers"

SPECIMENS = [
    Specimen("gold_in_the_first_order", f"{ENSEMBLES}, get_ensemble_score", gold_in_the_first_order, *GOLD),
    Specimen("gold_unsorted", "a slip", gold_unsorted, *GOLD),
    Specimen(
        "variance_of_a_sample",
        f"{ENSEMBLES}: np.var in best-of-n, torch.var in PPO",
        variance_of_a_sample,
        truths.ensembles_have_one_variance,
        "not that of the members' mixture",
    ),
    Specimen(
        "zero_is_no_weight",
        f"{ENSEMBLES}: a weight of 0 falls back to 1",
        zero_is_no_weight,
        truths.a_k_of_zero_is_the_mean,
        "a k of 0 penalizes",
    ),
]
