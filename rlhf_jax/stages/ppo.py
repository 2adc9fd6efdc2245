"""Policy optimization against rewards, with a KL penalty to the frozen starting policy: PPO, and without a critic RLOO,
GRPO and REINFORCE++.

An iteration is a rollout, its scores, and the updates made of them; `stages.ppo_roles` says who reads and who trains.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_private
from rlhf_jax.data.examples import Example, prompt_ids, show_example
from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import batch_sharding
from rlhf_jax.models.roles import Weights, scaled_adapters, weight_axes, without_heads
from rlhf_jax.objectives import kl_gradient
from rlhf_jax.rollout import Rollout
from rlhf_jax.rollout.batches import narrowest
from rlhf_jax.stages.constraint import calibrated, check_constraint, constraint_config, constraint_figures, out_of_reach
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.judges import check_sources
from rlhf_jax.stages.packed import PackedData
from rlhf_jax.stages.plan import tokenizer_of
from rlhf_jax.stages.ppo_evaluation import make_evaluation
from rlhf_jax.stages.ppo_roles import Roles, load_roles
from rlhf_jax.stages.private_ppo import Drawn, begin_private, make_private_iteration
from rlhf_jax.stages.prompts import Prompts, check_decode_rows, check_stop_strings, make_sampler
from rlhf_jax.stages.secrets import follow_secrets, make_nearness
from rlhf_jax.stages.train import train
from rlhf_jax.training.artifacts import describe_memory, save_role
from rlhf_jax.training.experience import PPOConfig, init_controllers, make_experience
from rlhf_jax.training.guards import Watch, check_unchanged
from rlhf_jax.training.ppo import make_single_update, make_update, score_logprobs
from rlhf_jax.training.randomness import order_seed, step_keys
from rlhf_jax.training.state import TrainState, fingerprint, init_state, make_optimizer, state_shardings

Draw = Callable[[int], tuple[np.ndarray, np.ndarray]]  # iteration -> prompts, and what their draws differ by
Sample = Callable[..., Rollout]  # (weights, placed prompts, key, samples) -> their rollout


def ppo_config(config: Any) -> PPOConfig:
    """The numbers of a ppo stage's config."""
    apart = {
        "constraint": constraint_config(config),
        "ptx_coef": config.ptx.coef,
        "stop_metric": config.early_stop.metric,
        "stop_limit": config.early_stop.limit,
    }
    names = [name for name in PPOConfig.__dataclass_fields__ if name not in apart]
    return PPOConfig(**{name: config[name] for name in names}, **apart)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    rows = config.batch_size // (config.minibatches * config.accumulation)
    context.check_rows("batch_size / (minibatches * accumulation)", rows)
    prompts = config.batch_size // (config.samples * config.rollout_parts)
    context.check_rows("batch_size / (samples * rollout_parts)", prompts)
    context.check_folders()
    check_sources(context)
    check_constraint(context)
    check_stop_strings(context, tokenizer_of(context, config.init))
    check_decode_rows(context, config.samples)
    context.check_data(config.schema)


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first prompts as the policy reads them: all of it given, nothing of it trained on."""
    config = context.config
    records = context.stream(config.data, config.schema, 3)
    if config.schema == "text":
        longest = len(tokenizer.prefix) + config.prefix_tokens[1]
        rows = [list(tokenizer.encode_prompt(record["text"]))[:longest] for record in records]
    else:
        rows = [prompt_ids(tokenizer, record["prompt"]) for record in records]
    return [show_example(tokenizer, Example(ids, [False] * len(ids))) for ids in rows]


def run(context: Context) -> dict[str, Any]:
    """Trains, and returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    settings, share = ppo_config(config), None
    if settings.constraint:
        constraint, share = calibrated(context, settings.constraint)
        settings = dataclasses.replace(settings, constraint=constraint)
        binds = "" if share is None else f": it binds where {share:.0%} of answers are unsafe"
        context.progress(f"mean cost at most {constraint.threshold:.4g}{binds}")
    with jax.set_mesh(mesh):
        # --- roles and data --------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        prompts = Prompts(context, start.tokenizer, start.spec.config.context, config.data)
        private = begin_private(context, prompts) if is_private(config) else None
        if private is not None:
            settings = dataclasses.replace(settings, accumulation=private.accumulation)
        roles = load_roles(context, settings, start, mesh)
        spec = roles.policy.spec
        frozen_models = {"reference": roles.reference}
        for what, judge in roles.judges().items():
            frozen_models |= {f"{what} model {name}": role.weights for name, role in judge.roles.items()}
            frozen_models |= {f"{what} posterior {name}": held for name, held in judge.posteriors.items()}
        anchors = {name: fingerprint(weights) for name, weights in frozen_models.items()}
        mixed = _ptx(context, roles, mesh)
        steps_each = settings.epochs * settings.minibatches
        iterations = private.iterations if private else config.iterations
        context.progress(
            f"{len(prompts)} prompts, {iterations} iterations of {config.batch_size} answers, {steps_each} "
            f"steps each; KL in the {config.kl_in} by {config.kl_estimator}: "
            f"{kl_gradient(config.kl_estimator, config.kl_in)}"
        )

        # --- state and programs ----------------------------------------------------------------------------------
        optimizer = make_optimizer(config.optimizer, iterations * steps_each, param_dtype=spec.config.param_dtype)
        axes = {name: weight_axes(role.spec, roles.trainable[name]) for name, role in roles.trained().items()}
        controllers = init_controllers(settings)
        shardings = state_shardings(roles.trainable, axes, optimizer, mesh, controllers)
        state = init_state(roles.trainable, axes, optimizer, mesh, controllers, config.optimizer.learning_rate)
        memory = roles.memory(state.params, state.opt_state)
        context.progress(describe_memory(memory))
        sample = _sampler(context, roles, mesh)
        width, watch = prompts.longest + config.max_new_tokens, None
        if private is not None:
            drawn = Drawn(context, private, mesh)
            roll_out = _rollouts(context, roles, prompts, sample, drawn.rows, mesh)
            advance = make_private_iteration(context, roles, roll_out, private, drawn, optimizer, shardings, width)
        else:
            watch = Watch(
                context.name, settings, context.experiment.checks, spec.config.dtype, config.kl_limit, context.progress
            )
            watch.remember(_first_figures(context))
            roll_out = _rollouts(context, roles, prompts, sample, _in_order(context, len(prompts)), mesh)
            learn = _learner(context, roles, mixed, optimizer, shardings)
            advance = _iteration(context, roles, roll_out, learn, watch)
        evaluate = None
        if config.evaluation.data:
            data = config.evaluation.data, config.evaluation.records
            held_out = Prompts(context, roles.policy.tokenizer, spec.config.context, *data)
            size = private.rollout_rows if private else config.batch_size
            evaluate = make_evaluation(context, held_out, roles, sample, size, mesh)
            evaluate = follow_secrets(
                context, roles.policy, lambda params: roles.acting(params)["policy"], evaluate, mesh
            )

        # --- loop ------------------------------------------------------------------------------------------------
        tokens = config.batch_size * width
        params, summary = train(
            context,
            state,
            advance,
            evaluate,
            iterations=iterations,
            steps_each=steps_each,
            shown=("objective/scores", "objective/kl", "eval/score", "eval/kl"),
            tokens_each=tokens,
            flops_each=tokens * spec.config.forward_flops(width) * roles.forward_passes(settings.epochs),
            watch=watch,
            anchors=anchors,
            account=private.account if private else None,
        )
        check_unchanged(context.name, anchors, frozen_models)
        policy = roles.acting(params)["policy"]
        roles.policy.weights = without_heads(policy)
        constrained: dict[str, Any] = {}
        if settings.constraint:
            lagrangian = summary["controllers"].lagrangian
            constrained = constraint_figures(settings.constraint, share, lagrangian)
            for text in out_of_reach(settings.constraint, lagrangian):
                context.progress(f"warning: {context.name}: {text}")
                if watch:
                    watch.warnings.append(text)
        prints = save_role(context.workdir, context.name, roles.policy)
    figures = {
        "prompts": len(prompts),
        "skipped": prompts.skipped,
        "iterations": summary["iterations"],
        "ended_early": summary["ended_early"] or "no",
        "steps": summary["iterations"] * steps_each,
        **_kl_figures(context),
        **constrained,
        **(private.figures() if private else {}),
        **({"warnings": watch.warnings or "none"} if watch else {}),
        "fingerprints": prints,
        "frozen": anchors,
        "memory": memory,
        "scored_in_one_pass": roles.together,
    }
    samples = []
    if evaluate is not None:
        comparison = json.loads((context.folder / "evaluation.json").read_text())
        figures |= comparison["figures"]
        samples = comparison["samples"]
    return {"figures": figures, "samples": samples}


def _sampler(context: Context, roles: Roles, mesh: Mesh) -> Sample:
    decode = make_sampler(context, roles.policy, mesh)
    scale = jax.jit(lambda weights: scaled_adapters(roles.policy.spec, weights))

    def sample(weights: Weights, batch: dict[str, jax.Array], key: jax.Array, samples: int = 1) -> Rollout:
        adapters = scale(without_heads(weights))
        return decode(weights["base"], batch, key, samples, adapters)

    return sample


def _in_order(context: Context, prompts: int) -> Draw:
    """The prompts of each iteration, epoch by epoch."""
    count = context.config.batch_size // context.config.samples
    order = DataOrder(prompts, order_seed(context.seed, context.name))
    return lambda iteration: (order.batch(iteration, count), order.epochs(iteration, count))


def _rollouts(context: Context, roles: Roles, prompts: Prompts, sample: Sample, draw: Draw, mesh: Mesh):
    """The function (policy weights, iteration) -> (rollout, scores on their way).

    A rollout is decoded in `rollout_parts`, all of them asked for at once: while the device decodes one, reward
    functions read those before it. Its rows are the prompts', each `samples` times in a row.
    """
    config, parts = context.config, context.config.rollout_parts
    keys = step_keys(context.key("rollout"), config.iterations)
    join = jax.jit(
        lambda rollouts: jax.tree.map(lambda *x: jnp.concatenate(x), *rollouts), out_shardings=batch_sharding(mesh)
    )

    def roll_out(policy: Weights, iteration: int) -> tuple[Rollout, list[Any]]:
        rows, epochs = draw(iteration)
        width = narrowest(prompts.widths, prompts.rows["lengths"][rows].max())
        rollouts, pending = [], []
        for mine, when in zip(np.split(rows, parts), np.split(epochs, parts), strict=True):
            rollout = sample(policy, prompts.place(mine, when, mesh, width), keys[iteration], config.samples)
            records = [prompts.records[row] for row in mine for _ in range(config.samples)]
            pending.append(roles.begin(rollout, records))
            rollouts.append(rollout)
        return rollouts[0] if parts == 1 else join(rollouts), pending

    return roll_out


def _learner(context: Context, roles: Roles, mixed: "_Mixed | None", optimizer: Any, shardings: TrainState):
    """The function (state, acting, rollout, pending scores, iteration) -> (state, experience, scores, metrics).

    Scores are waited for last: reward functions run on the host while the device reads the rollout.
    """
    settings, policy = roles.settings, roles.policy.spec
    value, cost_value = roles.critic_specs
    segments = mixed.segments if mixed else 1
    parts = settings.minibatches * settings.accumulation
    if settings.single:
        at_once = make_single_update(settings, policy, value, optimizer, shardings, segments, cost_value)

        def learn_at_once(state: Any, acting: Any, rollout: Rollout, pending: Any, iteration: int):
            ref_logprobs, _ = score_logprobs(policy, roles.reference, rollout, parts)
            ptx = mixed.batch(iteration) if mixed else None
            scores, sources, costs = roles.finish(pending)
            judged = scores, sources, ptx, costs
            state, experience, metrics = at_once(state, roles.frozen, rollout, ref_logprobs, *judged)
            return state, experience, scores, metrics

        return learn_at_once
    update = make_update(settings, policy, value, optimizer, shardings, segments, cost_value)
    keys = step_keys(context.key("minibatches"), context.config.iterations)

    def learn(state: Any, acting: Any, rollout: Rollout, pending: Any, iteration: int):
        read = roles.score(acting, rollout, parts)
        scores, sources, costs = roles.finish(pending)
        judged = scores, state.controllers, sources, costs
        experience, metrics, controllers = make_experience(settings, rollout, read, *judged)
        ptx = mixed.batch(iteration) if mixed else None
        state, kl_coef = state.replace(controllers=controllers), metrics["objective/kl_coef"]
        state, updates = update(state, roles.frozen, experience, kl_coef, keys[iteration], ptx)
        return state, experience, scores, metrics | updates

    return learn


def _iteration(context: Context, roles: Roles, roll_out: Any, learn: Any, watch: Watch):
    """The function (state, iteration) -> (state, metrics): a rollout, its scores, and the updates made of them."""

    nearness = make_nearness(context, roles.policy)

    def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
        acting = roles.acting(state.params)
        rollout, pending = roll_out(acting["policy"], iteration)
        near = nearness(rollout) if nearness else {}
        state, experience, scores, metrics = learn(state, acting, rollout, pending, iteration)
        watch.inspect(rollout, scores, experience, bool(context.config.stop_strings))
        return state, metrics | near

    return advance


class _Mixed:
    """The packed rows of `ptx.data` that each iteration's updates mix in, as many as answers."""

    def __init__(self, context: Context, tokenizer: Tokenizer, mesh: Mesh):
        config = context.config
        self._data = PackedData(context, tokenizer, config.ptx.data, "ptx", config.ptx)
        self._order = DataOrder(len(self._data.plan), order_seed(context.seed, f"{context.name}/ptx"))
        self._rows, self._mesh = config.epochs * config.batch_size, mesh
        self.segments = self._data.segments

    def batch(self, iteration: int) -> dict[str, jax.Array]:
        return self._data.place(self._order.batch(iteration, self._rows), self._mesh)


def _ptx(context: Context, roles: Roles, mesh: Mesh) -> _Mixed | None:
    return _Mixed(context, roles.policy.tokenizer, mesh) if context.config.ptx.coef else None


def _rows(context: Context) -> list[dict[str, Any]]:
    path = context.folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _first_figures(context: Context) -> dict[str, float]:
    """The first iteration's figures, where a cut run has logged them."""
    try:
        return next((row for row in _rows(context) if "policy/entropy" in row), {})
    except json.JSONDecodeError:  # a torn line, which the loop cuts off
        return {}


def _kl_figures(context: Context) -> dict[str, Any]:
    """How far the policy went, and how near an adaptive coefficient held it to its target."""
    config, rows = context.config, _rows(context)
    training = [row["objective/kl"] for row in rows if "objective/kl" in row]
    measured = training + [row["eval/kl"] for row in rows if "eval/kl" in row]
    if not measured:  # a private stage shows no KL of its own prompts
        return {"kl_gradient": kl_gradient(config.kl_estimator, config.kl_in)}
    highest = max(measured)
    last = (training or measured)[-max(1, len(training or measured) // 4) :]
    settled = {"kl_target": config.kl_target} if config.kl_controller == "adaptive" else {}
    return {
        "kl_gradient": kl_gradient(config.kl_estimator, config.kl_in),
        "kl_coef": next(row["objective/kl_coef"] for row in reversed(rows) if "objective/kl_coef" in row),
        "kl_limit": config.kl_limit,
        "kl_highest": highest,
        "kl_below_limit": highest < config.kl_limit,
        "kl_last_quarter": sum(last) / len(last),
        **settled,
    }
