"""An audit of a private stage: its own program runs once more with canaries among its units, and is then accused.

Canaries are units whose gradient is one coordinate far above the clip norm; a fair coin decides which are in. They go
through the stage's real sampling, back end, clip and noise; whoever can tell those that were in from those that were
not knows how much the mechanism really gives away. The model that this trains is thrown away.
"""

import copy
import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.corpus import keyed_generator
from rlhf_jax.data.units import Units
from rlhf_jax.distributed.sharding import fetch
from rlhf_jax.privacy.gradient import Canaries, PrivateStep
from rlhf_jax.stages import cost, ppo, preference, reward, sft
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import CLAIM_FILE, Private
from rlhf_jax.training.checkpoints import clear

RUNS = {"sft": sft.run, "reward": reward.run, "cost": cost.run, "preference": preference.run, "ppo": ppo.run}
NEVER = 10**9  # steps between checkpoints of a run that cannot be taken up again


class Recording:
    """What an audited run is given, and what it leaves.

    Attributes:
      included: (canaries,) bool, a fair coin each.
      private: the run's own side of training, and step: its noisy step, once it has begun.
    """

    def __init__(self, canaries: Canaries, rng: np.random.Generator):
        self.canaries = canaries
        self.included = rng.random(canaries.number) < 0.5
        self.private: Private | None = None
        self.step: PrivateStep | None = None
        self._seen: dict[str, list[np.ndarray]] = {"audit/canaries": [], "audit/idle": []}

    def joined(self, units: Units) -> Units:
        """The units, and after them the canaries that are in: units without a row of data."""
        names = [f"canary {number}" for number in np.flatnonzero(self.included)]
        empty = np.full((len(names), units.rows.shape[1]), -1, np.int64)
        return Units([*units.names, *names], np.concatenate([units.rows, empty]))

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """The canary at each place after the real units, int32; -1 for a negative place."""
        inside = np.flatnonzero(self.included)
        return np.where(places >= 0, inside[np.maximum(places, 0)], -1).astype(np.int32)

    def take(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Keeps what was watched in an iteration's steps, and returns the other metrics."""
        for name, kept in self._seen.items():
            kept.append(np.atleast_2d(fetch(metrics[name])))
        return {name: value for name, value in metrics.items() if name not in self._seen}

    def watched(self) -> tuple[np.ndarray, np.ndarray]:
        """(noisy steps, canaries) and (noisy steps, idle coordinates)."""
        canaries, idle = (np.concatenate(kept) for kept in self._seen.values())
        return canaries, idle


def check(context: Context) -> None:
    """Nothing more than what the audited stage itself checks."""


def run(context: Context) -> dict[str, Any]:
    """Runs the stage with canaries; returns what the audit found."""
    from rlhf_jax.privacy.auditing import audit_report  # slow to import

    config = context.config
    rng = keyed_generator(context.seed, context.name, "canaries")
    canaries = Canaries(config.canaries, config.idle, int(rng.integers(2**31)))
    recording = Recording(canaries, rng)
    audited = _as_audited(context, recording)
    for left in ("checkpoints", "model"):  # of an audit that was cut: it begins anew, with other noise
        clear(context.folder / left)
    (context.folder / CLAIM_FILE).unlink(missing_ok=True)
    RUNS[audited.config.kind](audited)
    clear(context.folder / "model")

    private, step = recording.private, recording.step
    assert private is not None and step is not None, "a private stage makes both before its first step"
    seen, idle = recording.watched()
    plan = private.plan
    report = audit_report(
        seen,
        recording.included,
        idle,
        mechanism=dataclasses.replace(plan.mechanism, noise_multiplier=step.gradient_noise),
        delta=plan.delta,
        rng=rng,
        confidence=config.confidence,
        level=config.level,
    )
    for flag in report.flags:
        context.progress(f"warning: {context.name}: {flag}")
    figures = {
        "subject": config.subject,
        "verdict": "flagged" if report.flags else "nothing speaks against the claim",
        "flags": "; ".join(report.flags) or "none",
        "canaries": config.canaries,
        "canaries_in": int(recording.included.sum()),
        "noisy_steps": len(seen),
        "epsilon_claimed": report.epsilon,
        "delta": report.delta,
        "lower_bound": report.lower_bound,
        "confidence": report.confidence,
        "estimate": min(report.estimate, float(NEVER)),
        "alarm": min(report.alarm, float(NEVER)),
        "level": report.level,
        "noise": {name: value for name, value in dataclasses.asdict(report.noise).items() if name != "findings"},
    }
    return {"figures": figures, "samples": []}


def _as_audited(context: Context, recording: Recording) -> Context:
    """The audited stage under the audit's own name, folder and draws, without what judges or keeps its model."""
    experiment = copy.deepcopy(context.experiment)
    subject = copy.deepcopy(experiment.stages[context.config.subject])
    subject.checkpoint.every = subject.evaluation.every = NEVER
    if subject.kind != "reward":
        subject.evaluation.data = ""
    subject.evaluation.metric = ""
    experiment.stages[context.name] = subject
    return dataclasses.replace(context, experiment=experiment, audited=recording)
