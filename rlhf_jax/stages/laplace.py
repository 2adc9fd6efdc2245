"""A Gaussian over a trained scorer's adapters and head: what its scores do not know.

The subject's weights are the mean; the curvature of its training data's likelihood, at each answer's end, and a prior
give the covariance (Laplace-LoRA, arXiv 2308.13111; reward models, 2402.13210). The likelihood is that of the head as
it was trained: a reward stage's calibration is undone for the fit and put back into what the posterior says. The head's
bias is left out. What is chosen by held-out records is chosen by every second one; the others are reported.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from rlhf_jax.data.order import in_batches
from rlhf_jax.distributed.processes import is_main_process
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.uncertainty import (
    fit_temperature,
    fit_variance_scale,
    negative_log_likelihood,
    probit_probability,
)
from rlhf_jax.models.lora import init_adapters
from rlhf_jax.models.roles import member
from rlhf_jax.stages import laplace_figures as held
from rlhf_jax.stages.context import CHECKED_RECORDS, Context
from rlhf_jax.stages.cost import make_rows
from rlhf_jax.stages.plan import shape_of
from rlhf_jax.stages.posteriors import fingerprints, save_posterior
from rlhf_jax.stages.reward import make_pairs
from rlhf_jax.stages.scorer import Rows, place_answers, rows_hash
from rlhf_jax.training.artifacts import Role
from rlhf_jax.uncertainty.fit import Curvature, fit, groups, joint_gradient
from rlhf_jax.uncertainty.jacobians import HEAD, blocks_of
from rlhf_jax.uncertainty.posterior import Posterior, precisions
from rlhf_jax.uncertainty.prior import curve, log_evidence, maximize, merged

VALIDATED = np.logspace(-4, 6, 41)  # precisions that held-out records choose among


@dataclasses.dataclass
class AsSubject(Context):
    """The laplace stage's context with its subject's fields: it makes rows as the subject does, in its own folder."""

    @property
    def config(self) -> ConfigDict:
        own = self.experiment.stages[self.name]
        fields = self.experiment.stages[own.subject].copy_and_resolve_references()
        fields.evaluation.records = own.evaluation.records
        return fields


def as_subject(context: Context) -> AsSubject:
    return AsSubject(context.name, context.experiment, context.workdir, context.identity, context.bases)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    subject = context.experiment.stages[config.subject]
    context.check_rows("batch_size", config.batch_size)
    for field in ("data", "shifted"):
        data, names = config.evaluation[field], context.data_names(f"evaluation.{field}")
        if data and not any(name.split("/")[0] in context.experiment.stages for name in names):
            for _ in as_subject(context).stream(data, subject.schema, CHECKED_RECORDS):
                pass


def describe(context: Context) -> list[str]:
    """What `--dry_run` says: how many weights are uncertain, and what the posterior takes."""
    config, stages = context.config, context.experiment.stages
    shape, members = shape_of(context, config.subject), stages[config.subject].members
    lora = dataclasses.replace(context, name=config.subject).lora() if config.scope == "all" else None
    if shape is None:
        return ["posterior: its size is known once the tokenizer is there"]
    adapters = jax.eval_shape(partial(init_adapters, shape, lora), key=jax.random.key(0)) if lora else None
    blocks = jax.eval_shape(blocks_of, adapters, jax.ShapeDtypeStruct((shape.width, 1), jnp.float32))
    weights = sum(math.prod(block.shape) for block in blocks.values())
    line = f"posterior over {weights / 1e6:.2f}M weights" + (f" of each of {members} members" if members > 1 else "")
    if config.structure == "dual":
        return [f"{line}, exact: {4 * weights} bytes a term of the training data, in all at most 1 GiB"]
    numbers = sum(_numbers(config, *block.shape) for block in blocks.values())
    return [f"{line}, {config.structure}: {4 * members * numbers / 2**20:.1f} MiB"]


def _numbers(config: ConfigDict, layers: int, large: int, small: int) -> int:
    """How many a block's curvature takes."""
    if config.structure == "diagonal":
        return layers * large * small
    kept = min(config.rank or large, large)
    return layers * (large * kept + small * small + kept * small)


def run(context: Context) -> dict[str, Any]:
    """Fits the posterior; returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    subject = context.experiment.stages[config.subject]
    with jax.set_mesh(mesh):
        # --- the subject and its data ----------------------------------------------------------------------------
        role = context.load(config.subject, mesh)
        check_trained(config.subject, role, config.scope)
        training, scales, hashed = training_rows(context, role)
        columns = held.columns_of(training)
        parts = {
            part: make_held_out(context, role, data, part, mesh)
            for part, data in (("evaluation", config.evaluation.data), ("shifted", config.evaluation.shifted))
            if data
        }
        count, members = len(training["lengths"]), role.spec.members

        def batches(name: str) -> Iterator[dict[str, jax.Array]]:
            size = config.batch_size
            rows = in_batches(count, size)
            title, quiet = f"{context.name}: {name}", not is_main_process()
            for part in tqdm(rows, desc=title, disable=quiet, mininterval=1.0, file=sys.stdout):
                yield place_answers(columns, training, part, np.zeros(size, int), mesh)

        # --- the posterior of each member ------------------------------------------------------------------------
        found = []
        for number in range(members):
            spec, weights = member(role.spec, role.weights, number)
            curvature = fit(
                spec,
                weights,
                partial(batches, "curvature" + (f" of member {number + 1}" if members > 1 else "")),
                records=count,
                scope=config.scope,
                structure=config.structure,
                factors=config.factors,
                corrected=config.corrected,
                rank=config.rank,
                scale=scales[number],
                key=context.key("sketch"),
            )
            if subject.get("loss_on") == "token":
                curvature.notes.append("trained at every token, but its curvature is read at the answers' ends alone")
            for note in curvature.notes:
                context.progress(f"warning: {note}")
            one = dataclasses.replace(role, spec=spec, weights=weights)
            found.append(_with_prior(context, one, curvature, scales[number], parts.get("evaluation"), mesh))
        posteriors, figures = zip(*found, strict=True)
        posterior = jax.tree.map(lambda *x: jnp.stack(x), *posteriors) if members > 1 else posteriors[0]

        # --- what it says ----------------------------------------------------------------------------------------
        info = {"subject": config.subject, "fingerprints": fingerprints(role), "rows": hashed}
        save_posterior(context.folder, posterior, {**info, "structure": config.structure})
        out: dict[str, Any] = {"records": count, **(figures[0] if members == 1 else {"members": list(figures)})}
        if parts:
            out |= held.figures(context, role, posteriors, training, parts, mesh)
    return {"figures": out, "samples": []}


def check_trained(name: str, role: Role, scope: str) -> None:
    """Raises a UserError where there is nothing for the scope's posterior to be over."""
    if scope == "head":
        return
    if role.spec.lora is None:
        raise UserError(f'stage {name} has no adapters: train it with lora.rank, or set scope="head"')
    if not any(bool(jnp.any(leaf["b"] != 0)) for leaf in role.weights["adapters"].values()):
        raise UserError(f'the adapters of stage {name} are not trained (every b is 0): train it, or set scope="head"')


def training_rows(context: Context, role: Role) -> tuple[Rows, list[float], str]:
    """The rows the subject was trained on, what each member's head was divided by after it, and the rows' hash.

    Raises:
      UserError: the rows are missing, or are not those the subject names.
    """
    name = context.config.subject
    kind, folder = context.experiment.stages[name].kind, context.workdir / name
    path = folder / "data" / ("pairs_train.npz" if kind == "reward" else "rows_train.npz")
    result = folder / "result.json"
    for file in (path, result):
        if not file.exists():
            raise UserError(f"{file} is missing: delete the folder of stage {name} and run again to make it anew")
    with np.load(path) as saved:
        rows = dict(saved)
    figures = json.loads(result.read_text())["figures"]
    hashed = rows_hash(rows)
    if figures.get("rows") != hashed:
        raise UserError(
            f"{path} holds other rows ({hashed}) than stage {name} was trained on ({figures.get('rows')}): put those "
            "back, or delete the stage's folder and run again"
        )
    scale = figures.get("calibration", {}).get("std_before", [1.0] * role.spec.members)
    return rows, scale if isinstance(scale, list) else [scale], hashed


def make_held_out(context: Context, role: Role, data: str, part: str, mesh: Mesh) -> Rows:
    """Held-out rows as the subject's own stage makes them."""
    own = as_subject(context)
    if own.config.kind == "cost":
        return make_rows(own, role, data, part)
    sampled = own.config.schema == "completion"
    policy = context.load(own.config.policy or own.config.init, mesh) if sampled else role
    return make_pairs(own, role.spec, policy, data, part, mesh)


def _with_prior(
    context: Context, role: Role, curvature: Curvature, scale: float, held_out: Rows | None, mesh: Mesh
) -> tuple[Posterior, dict[str, Any]]:
    """The posterior of one member with the config's prior and temperature, and its figures."""
    config = context.config
    together, each = merged(groups(curvature, False)), groups(curvature, config.per_layer)
    one = jnp.ones(())
    posterior = Posterior(curvature.factors, None, jnp.asarray(scale, jnp.float32), one, one, config.scope)
    figures: dict[str, Any] = {}
    chosen = {name: config.precision for name in each}
    if config.prior == "evidence":
        chosen = {name: maximize(group) for name, group in each.items()}
    elif config.prior == "validation":
        assert held_out is not None
        grid = jax.tree.map(lambda *x: jnp.stack(x), *(precisions(curvature.factors, float(x)) for x in VALIDATED))
        mean, variance, outcomes = held.moments(role, posterior, held_out, config.batch_size, mesh, grid)
        tuned = held.tuning(len(mean))
        losses = [
            negative_log_likelihood(probit_probability(mean[tuned], row[tuned]), outcomes[tuned]) for row in variance
        ]
        chosen = {name: float(VALIDATED[int(np.argmin(losses))]) for name in each}
        figures["validation"] = [
            {"precision": float(x), "nll": loss} for x, loss in zip(VALIDATED, losses, strict=True)
        ]
    precision = precisions(curvature.factors, chosen if config.per_layer else chosen["all"])
    posterior = dataclasses.replace(posterior, precision=precision)
    if config.temper:
        assert held_out is not None
        single = jax.tree.map(lambda x: x[None], precision)
        mean, variance, outcomes = held.moments(role, posterior, held_out, config.batch_size, mesh, single)
        tuned = held.tuning(len(mean))
        temperature = fit_temperature(mean[tuned], outcomes[tuned])
        wider = fit_variance_scale(mean[tuned], variance[0, tuned], outcomes[tuned], temperature)
        scales = dict(temperature=jnp.float32(temperature), variance_scale=jnp.float32(wider))
        posterior = dataclasses.replace(posterior, **scales)
        figures |= {"temperature": temperature, "variance_scale": wider}
    named = {"head" if name == HEAD else str(name): value for name, value in chosen.items()}
    shown: Any = named if config.per_layer else chosen["all"]
    figures |= {
        "precision": shown,
        "log_evidence": log_evidence(curvature.log_likelihood, each, chosen),
        "log_likelihood": curvature.log_likelihood,
        "weights_norm": float(np.sqrt(together.norm)),
        **joint_gradient(curvature, jax.device_get(precision)),
        "curve": curve(curvature.log_likelihood, together),
        "notes": curvature.notes,
    }
    return posterior, figures
