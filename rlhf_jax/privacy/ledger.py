"""What private stages claim together: spent on shared units it adds up, on disjoint ones the worst counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_jax.privacy.accounting import Mechanism, composed_epsilon

WEAK = 10  # an epsilon above it is said to promise little


@dataclass(frozen=True)
class Spent:
    """One private run of a stage; a stage that was begun anew has several."""

    stage: str
    mechanism: Mechanism
    delta: float


def sharing_groups(stages: Sequence[str], shared: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Stages that share units, directly or through others, in groups; every stage is in one.

    Simplification: where a shares with b and b with c, all three are composed, though no unit may be in all of them.
    """
    group = {stage: stage for stage in stages}
    for a, b in shared:
        old, new = group[b], group[a]
        group = {stage: new if head == old else head for stage, head in group.items()}
    return [[stage for stage in stages if group[stage] == head] for head in dict.fromkeys(group.values())]


def joint_claim(runs: Sequence[Spent], shared: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Epsilon of all runs together at the largest of their deltas, under both adjacencies.

    add_or_remove: a unit is in one group of stages that share units, whose runs compose (PLD); the worst group counts
    (parallel composition, McSherry 2009). replace_one: a unit is taken out of one group and another one put into the
    same or into a second one, as a hash may assign it there; the worst of both counts.

    Returns:
      {"epsilon", "epsilon_replace_one", "delta", "groups": [{"stages", "epsilon", "runs"}]}.
    """
    delta = max(run.delta for run in runs)
    stages = list(dict.fromkeys(run.stage for run in runs))
    groups = []
    for members in sharing_groups(stages, shared):
        own = [run.mechanism for run in runs if run.stage in members]
        groups.append((members, own, composed_epsilon(own, delta), composed_epsilon(own, delta, "replace_one")))
    moved = [
        composed_epsilon([*a, *b], delta) for i, (_, a, _, _) in enumerate(groups) for _, b, _, _ in groups[i + 1 :]
    ]
    return {
        "epsilon": max(removed for _, _, removed, _ in groups),
        "epsilon_replace_one": max([replaced for _, _, _, replaced in groups] + moved),
        "delta": delta,
        "groups": [{"stages": members, "epsilon": removed, "runs": len(own)} for members, own, removed, _ in groups],
    }


def statement(
    claim: Mapping[str, Any],
    *,
    unit: str,
    names: Sequence[str],
    raw: Sequence[str],
    public: Sequence[str],
    trusted: Sequence[str],
    discarded: int,
) -> list[str]:
    """The claim in plain sentences: what is hidden, how well, and what is not covered.

    Args:
      unit: what one unit is.
      names: the private stages.
      raw: stages that read private data without privacy.
      public: data declared public; trusted: checkpoint folders and reward functions taken to be public.
      discarded: runs whose stages were deleted from the work directory, which count all the same.
    """
    said = [
        f"Covered: the models of {', '.join(names)}, whatever is done with them, and their logs. What can be learned "
        f"from all of them of any one {unit} of the private data is bounded: (epsilon, delta) = "
        f"({claim['epsilon']:.4g}, {claim['delta']:.3g}) for its being there or not, epsilon "
        f"{claim['epsilon_replace_one']:.4g} for its being replaced by another one.",
        f"How many units ({unit}) each data set has is public.",
    ]
    if claim["epsilon"] > WEAK:
        said.append(f"An epsilon above {WEAK} rules little out in the worst case; a stage's own claim may be smaller.")
    if public:
        said.append(f"Not covered, declared public: {', '.join(public)}.")
    if trusted:
        said.append(f"Not covered, taken to be public: {', '.join(trusted)}.")
    if raw:
        said.append(
            f"Not covered: {', '.join(raw)}. They read private data without noise; do not publish their models, files "
            "or figures, nor this report while it shows them."
        )
    if discarded:
        said.append(f"Counted too: {discarded} earlier run(s), begun here and deleted since.")
    return [
        *said,
        "Not covered: other runs on the same data, such as those that tuned these settings; each spends as much again.",
        "Not covered: how long a step takes, an error that ends a run, floating-point rounding of the noise, and who "
        "can read the work directory: privacy.key undoes all noise, and tokenized data lies beside it.",
    ]
