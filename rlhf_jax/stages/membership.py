"""What tells the records a model was trained on from others: its own scores, a reference's, and no model at all."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from rlhf_jax.evaluation.asking import Questions, tokenize_secrets
from rlhf_jax.evaluation.extraction import membership_scores
from rlhf_jax.evaluation.membership import blind_scores, membership_row
from rlhf_jax.rollout import Sampling
from rlhf_jax.rollout.batches import read_all
from rlhf_jax.rollout.reading import Reading
from rlhf_jax.stages.context import Context
from rlhf_jax.training.artifacts import Role

SIDES = ("members", "others")


class Membership:
    """The scores of a memorization stage's `members` and `others`, subject by subject.

    Both data sets, the classifier that sees no model, and the reference's readings are the same for every subject: they
    are made once. The reference reads what the subject's tokenizer makes of a text.
    """

    def __init__(self, context: Context, mesh: Mesh):
        config = context.config
        self._context, self._mesh = context, mesh
        self._records = {side: context.spread_records(config[side], "completion", config.records)[0] for side in SIDES}
        texts = ([r["prompt"] + r["completion"] for r in self._records[side]] for side in SIDES)
        self._blind = membership_row("blind: no model", *blind_scores(*texts, seed=context.seed), context.seed)
        self._reference = context.load(config.reference, mesh) if config.reference else None
        self._against: dict[tuple[str, str], Reading] = {}  # (tokenizer, side) -> the reference's reading

    def rows(self, name: str, role: Role) -> list[dict[str, Any]]:
        """`membership_row` of each score of one subject, and of the classifier, each with the `subject`."""
        members, others = (self._scores(side, name, role) for side in SIDES)
        rows = [membership_row(score, members[score], others[score], self._context.seed) for score in members]
        return [{"subject": name, **row} for row in [*rows, self._blind]]

    def _scores(self, side: str, name: str, role: Role) -> dict[str, np.ndarray]:
        records, where = self._records[side], self._context.config[side]
        questions = tokenize_secrets(role.tokenizer, records, role.spec.config.context, where)
        key = (role.tokenizer.identity, side)
        if self._reference and key not in self._against:
            self._against[key] = self._read(self._reference, questions, f"{self._context.config.reference}, {side}")
        lengths = np.asarray([len(target) for target in questions.targets])
        reading = self._read(role, questions, f"{name}, {side}")
        return membership_scores(reading, lengths, questions.texts, self._against.get(key))

    def _read(self, role: Role, questions: Questions, label: str) -> Reading:
        return read_all(
            role.spec,
            role.weights,
            questions.prompts,
            questions.targets,
            scheme=Sampling(1),
            batch_size=self._context.config.batch_size,
            mesh=self._mesh,
            name=f"{self._context.name}: {label}",
        )
