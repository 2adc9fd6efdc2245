"""PPO against a reward model, with a KL penalty to the frozen starting policy.

Four roles: policy and value train; reference and reward are frozen. With adapters all that stem from one base share it.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_folder
from rlhf_jax.data.examples import Example, prompt_ids, show_example
from rlhf_jax.data.order import DataOrder
from rlhf_jax.data.schemas import Text
from rlhf_jax.data.stops import stop_table as make_stop_table
from rlhf_jax.data.table import pad_prompts
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.sharding import fetch, place_batch, replicated
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import scaled_adapters, split, training_passes, weight_axes
from rlhf_jax.rollout import Rollout, Sampling, generate
from rlhf_jax.rollout.batches import bucket_widths, check_lengths, narrowest
from rlhf_jax.rollout.reencode import ForeignScores
from rlhf_jax.rollout.scoring import RoleScores
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.plan import tokenizer_of
from rlhf_jax.stages.train import train
from rlhf_jax.training.artifacts import (
    Role,
    continue_role,
    describe_memory,
    role_memory,
    save_role,
)
from rlhf_jax.training.checkpoints import write_json
from rlhf_jax.training.ppo import (
    PPOConfig,
    end_penalized,
    make_experience,
    make_update,
    score_logprobs,
    score_rewards,
    score_together,
    score_values,
)
from rlhf_jax.training.randomness import order_seed, record_ids
from rlhf_jax.training.state import init_state, make_optimizer, state_shardings

EPOCH_STRIDE = 7919  # moves a record's draw identity from one epoch to the next


class Prompts:
    """Tokenized prompts of a data string, padded batch by batch to the narrowest bucket that holds them."""

    def __init__(self, context: Context, role: Role, data: str, limit: int | None = None):
        config = context.config
        records, self.skipped = context.records(data, "prompt", limit)
        self.texts = [r["prompt"] for r in records]
        ids = [prompt_ids(role.tokenizer, text) for text in self.texts]
        check_lengths(ids, config.max_new_tokens, role.spec.config.context, data)
        self.longest = max(len(x) for x in ids)
        self.widths = bucket_widths(config.prompt_buckets, self.longest)
        self.rows = pad_prompts(ids, self.longest)
        self.ids = record_ids([str(r.get("id", i)) for i, r in enumerate(records)])

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, rows: np.ndarray, epochs: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
        """{"prompts", "lengths", "row_ids"} on the mesh; a record's draws differ from epoch to epoch."""
        width = narrowest(self.widths, self.rows["lengths"][rows].max())

        def load(mine: np.ndarray) -> dict[str, np.ndarray]:
            chosen = rows[mine]
            row_ids = (self.ids[chosen].astype(np.int64) + EPOCH_STRIDE * epochs[mine]) % (1 << 31)
            fields = {"prompts": self.rows["prompts"][chosen, :width], "lengths": self.rows["lengths"][chosen]}
            return {**fields, "row_ids": row_ids.astype(np.int32)}

        return place_batch(len(rows), load, mesh)


def ppo_config(config: Any) -> PPOConfig:
    """The numbers of a ppo stage's config."""
    fields = {name: config[name] for name in PPOConfig.__dataclass_fields__}
    return PPOConfig(**fields)


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows(
        "batch_size / (minibatches * accumulation)", config.batch_size // (config.minibatches * config.accumulation)
    )
    context.check_folders()
    tokenizer = tokenizer_of(context, config.init)
    if config.stop_strings and tokenizer is not None:
        make_stop_table(tokenizer, config.stop_strings)
    context.check_data("prompt")


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first prompts as the policy reads them: all of it given, nothing of it trained on."""
    records = context.stream(context.config.data, "prompt", 3)
    rows = [prompt_ids(tokenizer, record["prompt"]) for record in records]
    return [show_example(tokenizer, Example(ids, [False] * len(ids))) for ids in rows]


def run(context: Context) -> dict[str, Any]:
    """Trains, and returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    with jax.set_mesh(mesh):
        # --- roles -----------------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        policy = continue_role(start, context.lora(), config.compute, key=context.key("adapters"))
        reward = context.load(config.reward, mesh)
        # The critic starts from the reward model's weights, but its head from 0: the reward head is trained at the last
        # token alone, and what it says in the middle of an answer is off by more than the scores' spread. Where the
        # reward model reads other tokens, the critic starts from the policy's weights.
        foreign = reward.tokenizer.identity != policy.tokenizer.identity
        critic = start if foreign else reward
        value = continue_role(critic, context.lora(), config.compute, key=context.key("value adapters"))
        value.weights["head"] = init_head(value.spec.config.width, 0.0, key=context.key("value head"))
        del start, critic  # a base that policy and value do not read is let go
        # The reference is the policy's starting weights; training works on a copy (`init_state`).
        reference = policy.weights
        prompts = Prompts(context, policy, config.data)
        order = DataOrder(len(prompts), order_seed(context.seed, context.name))
        sampling = Sampling(config.max_new_tokens, config.temperature, stop_ids=policy.tokenizer.stop_ids)
        settings = ppo_config(config)
        parts = settings.minibatches * settings.accumulation
        width = prompts.longest + config.max_new_tokens
        context.progress(
            f"{len(prompts)} prompts, {config.iterations} iterations of {config.batch_size} answers, "
            f"{settings.epochs * settings.minibatches} steps each"
        )

        # --- state and programs ----------------------------------------------------------------------------------
        halves = {"policy": split(policy.spec, policy.weights), "value": split(value.spec, value.weights)}
        trainable = {name: half[0] for name, half in halves.items()}
        frozen = {name: half[1] for name, half in halves.items()}
        axes = {
            "policy": weight_axes(policy.spec, trainable["policy"]),
            "value": weight_axes(value.spec, trainable["value"]),
        }
        steps_each = settings.epochs * settings.minibatches
        dtype = policy.spec.config.param_dtype
        optimizer = make_optimizer(config.optimizer, config.iterations * steps_each, param_dtype=dtype)
        shardings = state_shardings(trainable, axes, optimizer, mesh)
        state = init_state(trainable, axes, optimizer, mesh)
        update = make_update(settings, policy.spec, value.spec, config.temperature, optimizer, shardings)
        memory = _memory(policy, value, reward, frozen, state)
        context.progress(describe_memory(memory))
        rollout_keys = _fold_ins(context.key("rollout"), config.iterations)
        update_keys = _fold_ins(context.key("minibatches"), config.iterations)

        scale = jax.jit(lambda weights: scaled_adapters(policy.spec, weights))
        stop_table = None
        if config.stop_strings:
            table = make_stop_table(policy.tokenizer, config.stop_strings, policy.spec.config.vocab_size)
            stop_table = jax.device_put(table, replicated(mesh))

        def sample(weights: Any, batch: dict[str, jax.Array], key: jax.Array) -> Rollout:
            return generate(
                policy.spec.config,
                weights["base"],
                batch["prompts"],
                batch["lengths"],
                key=key,
                sampling=sampling,
                row_ids=batch["row_ids"],
                adapters=scale(weights),
                stop_table=stop_table,
            )

        imported = is_folder(context.experiment.stages, config.reward)
        rescore = ForeignScores(reward.spec, reward.weights, reward.tokenizer, policy.tokenizer, mesh, imported)

        def judge(rollout: Rollout, texts: list[Text]) -> jax.Array:
            if foreign:
                return rescore(rollout, texts)
            return score_rewards(reward.spec, reward.weights, rollout, parts, stop_table is not None)

        one_base = value.weights["base"] is policy.weights["base"] and policy.spec.lora is not None
        together = one_base and value.spec == policy.spec

        def score(acting: Any, rollout: Rollout) -> RoleScores:
            """Policy, reference and value on the rollout: in one pass where they share a base."""
            if together:
                adapters = {name: acting[name]["adapters"] for name in acting} | {"reference": reference["adapters"]}
                base, head = policy.weights["base"], acting["value"]["head"]
                return score_together(policy.spec, base, adapters, head, rollout, parts)
            logprobs, entropy = score_logprobs(policy.spec, acting["policy"], rollout, parts)
            ref_logprobs, _ = score_logprobs(policy.spec, reference, rollout, parts)
            values = score_values(value.spec, acting["value"], rollout, parts)
            return RoleScores(logprobs, ref_logprobs, entropy, values)

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            rows, epochs = (f(iteration, config.batch_size) for f in (order.batch, order.epochs))
            acting = {name: {**frozen[name], **state.params[name]} for name in frozen}
            rollout = sample(acting["policy"], prompts.place(rows, epochs, mesh), rollout_keys[iteration])
            scores = judge(rollout, [prompts.texts[row] for row in rows])
            experience, metrics = make_experience(settings, rollout, *score(acting, rollout), scores)
            state, updates = update(state, frozen, experience, update_keys[iteration])
            return state, metrics | updates

        evaluate = None
        if config.evaluation.data:
            held_out = Prompts(context, policy, config.evaluation.data, config.evaluation.records)
            evaluate = _evaluation(context, held_out, policy, reference, frozen, judge, sample, mesh)

        # --- loop ------------------------------------------------------------------------------------------------
        forward = config.batch_size * width * policy.spec.config.forward_flops(width)
        params, _ = train(
            context,
            state,
            advance,
            evaluate,
            iterations=config.iterations,
            steps_each=steps_each,
            shown=("objective/scores", "objective/kl", "eval/score", "eval/kl"),
            tokens_each=config.batch_size * width,
            # decoding once, scoring by four roles, training two of them (forward and backward) every epoch
            flops_each=forward * (1 + 4 + 2 * training_passes(policy.spec) * settings.epochs),
        )
        policy.weights = {**frozen["policy"], **params["policy"]}
        prints = save_role(context.workdir, context.name, policy)
    rows = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    kls = [row[name] for row in rows for name in ("objective/kl", "eval/kl") if name in row]
    figures = {
        "prompts": len(prompts),
        "skipped": prompts.skipped,
        "iterations": config.iterations,
        "steps": config.iterations * steps_each,
        "kl_coef": config.kl_coef,
        "kl_limit": config.kl_limit,
        "kl_highest": max(kls),
        "kl_below_limit": max(kls) < config.kl_limit,
        "fingerprints": prints,
        "memory": memory,
        "scored_in_one_pass": together,
    }
    samples = []
    if evaluate is not None:
        comparison = json.loads((context.folder / "evaluation.json").read_text())
        figures |= comparison["figures"]
        samples = comparison["samples"]
    return {"figures": figures, "samples": samples}


def _memory(policy: Role, value: Role, reward: Role, frozen: Any, state: Any) -> dict[str, dict[str, Any]]:
    """`role_memory` of the four roles as they stand in training, and the optimizer's share."""
    roles = {
        "policy": {**frozen["policy"], **state.params["policy"]},
        "reference": policy.weights,
        "value": {**frozen["value"], **state.params["value"]},
        "reward": reward.weights,
    }
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    return role_memory(roles) | {"optimizer": {"base_of": "optimizer", "optimizer": moments}}


def _fold_ins(key: jax.Array, count: int) -> list[jax.Array]:
    """Keys of iterations 0 ... count - 1, made before the loop so that the loop moves nothing to the device."""
    return list(jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)))


def _evaluation(
    context: Context,
    held_out: Prompts,
    policy: Role,
    reference: Any,
    frozen: Any,
    judge: Any,
    sample: Any,
    mesh: Mesh,
):
    """The function (params, iteration) -> {"eval/score", "eval/kl"} on held-out prompts, always with the same draws.

    `evaluation.json` keeps the starting policy's scores beside the newest ones.
    """
    config, key = context.config, context.key("evaluation")
    size = config.batch_size
    count = len(held_out) if len(held_out) < size else len(held_out) // size * size
    numbers = np.concatenate([np.arange(count), np.zeros(-count % size, int)]).reshape(-1, size)
    batches = [held_out.place(rows, np.zeros(size, int), mesh) for rows in numbers]
    parts = config.minibatches * config.accumulation
    path = context.folder / "evaluation.json"
    decode = policy.tokenizer.decode

    def answers(weights: Any) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {}
        for batch, rows in zip(batches, numbers, strict=True):
            rollout = sample(weights, batch, key)
            logprobs, _ = score_logprobs(policy.spec, weights, rollout, parts)
            ref_logprobs, _ = score_logprobs(policy.spec, reference, rollout, parts)
            scores = judge(rollout, [held_out.texts[row] for row in rows])
            fields = {
                "score": end_penalized(scores, rollout.ended, config.missing_end_penalty),
                "kl": (logprobs - ref_logprobs).sum(-1),
                "ended": rollout.ended,
                "tokens": rollout.tokens,
                "lengths": rollout.lengths,
            }
            for name, x in fetch(fields).items():
                columns.setdefault(name, []).append(x)
        return {name: np.concatenate(parts)[:count] for name, parts in columns.items()}

    def mean_interval(name: str, x: np.ndarray) -> dict[str, float]:
        half = 1.96 * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")
        return {name: float(x.mean()), f"{name}_low": float(x.mean() - half), f"{name}_high": float(x.mean() + half)}

    start: dict[str, np.ndarray] = {}

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        now = answers({**frozen["policy"], **params["policy"]})
        if not start:  # after a resume the starting policy is the reference itself
            start.update(now if iteration == 0 else answers(reference))
        figures = {
            "prompts_eval": count,
            **mean_interval("sft_score", start["score"]),
            **mean_interval("ppo_score", now["score"]),
            **mean_interval("score_gain", now["score"] - start["score"]),
            **mean_interval("kl", now["kl"]),
            "sft_ended": float(start["ended"].mean()),
            "ppo_ended": float(now["ended"].mean()),
        }
        samples = []
        for i in range(min(config.evaluation.samples, count)):
            length = held_out.rows["lengths"][i]
            prompt = decode(held_out.rows["prompts"][i, :length].tolist())
            for model, out in ((config.init, start), (context.name, now)):
                text = decode(out["tokens"][i, : out["lengths"][i]].tolist())
                samples.append({"model": model, "prompt": prompt, "completion": text, "score": float(out["score"][i])})
        write_json(path, {"figures": figures, "samples": samples})
        return {"eval/score": figures["ppo_score"], "eval/kl": figures["kl"]}

    return evaluate
