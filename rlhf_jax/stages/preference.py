"""Preference learning without a reward model: DPO and its hinge form, IPO, KTO, ORPO and SimPO in one stage.

The reference is the frozen start or another model. Its log-probabilities are computed once before training, then its
weights are let go; or in every step.
"""

import json
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf_jax.config import is_folder, is_private
from rlhf_jax.data.examples import completion_example, prompt_ids, show_example
from rlhf_jax.data.order import DataOrder, in_batches, without_padding
from rlhf_jax.data.pairs import Rows, answers_of, pad_answers, save_arrays, tokenize_answers
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.distributed.processes import as_process_0, barrier, is_main_process
from rlhf_jax.distributed.sharding import fetch, place_batch, replicated
from rlhf_jax.errors import UserError
from rlhf_jax.models.roles import RoleSpec, training_passes
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import Private, owners_of, units_of
from rlhf_jax.stages.secrets import follow_secrets
from rlhf_jax.stages.train import accuracy_figures, ordered, prepare, steps_of, train
from rlhf_jax.training.artifacts import (
    Role,
    continue_role,
    describe_memory,
    folder_identity,
    read_info,
    role_memory,
    save_role,
)
from rlhf_jax.training.gradient import mean_metrics
from rlhf_jax.training.preference import (
    PreferenceConfig,
    preference_gradient,
    preference_objective,
    summed_logprobs,
    with_kl,
    with_margins,
)
from rlhf_jax.training.randomness import order_seed
from rlhf_jax.training.state import fingerprint

KEPT = ("desirable", "reference")  # what a record may hold beside its rows
EVALUATED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def preference_config(config: Any) -> PreferenceConfig:
    """The numbers of a preference stage's config."""
    return PreferenceConfig(**{name: config[name] for name in PreferenceConfig.__dataclass_fields__})


# --- rows ------------------------------------------------------------------------------------------------------------


def _partners(records: int, seed: int) -> np.ndarray:
    """For each record another one, by a keyed order in which each is followed by its partner: (n,) int64."""
    order = DataOrder(records, seed).batch(0, records)
    partners = np.empty_like(order)
    partners[order] = np.roll(order, -1)
    return partners


def _make_rows(context: Context, role: Role, data: str, part: str) -> Rows:
    """Rows of prompt + chosen and prompt + rejected answer, made once.

    Records of schema "unpaired" have their own answer first, then another record's, cut to what the row holds.

    Returns {"tokens": (n, 2, T) int32, "lengths": (n, 2) int32 in all, "answer_lengths": (n, 2) int32}, with
    "desirable" (n,) bool of unpaired records, and "dropped", "skipped": the records left out.
    """
    file = context.folder / "data" / f"rows_{part}.npz"

    def build() -> None:
        config, tokenizer = context.config, role.tokenizer
        records, skipped = context.records(data, config.schema, None if part == "train" else config.evaluation.records)
        longest = min(config.sequence_length, role.spec.config.context)
        prompts = [prompt_ids(tokenizer, record["prompt"]) for record in records]
        kept, answers = tokenize_answers(tokenizer, records, prompts, config.schema, longest, config.on_error, data)
        if not kept:
            raise UserError(f"{data}: no record is left to train on ({len(records)} dropped): look at sequence_length")
        prompts = [prompts[i] for i in kept]
        extra: dict[str, Any] = {}
        if config.schema == "unpaired":
            partners = _partners(len(kept), order_seed(context.seed, f"{context.name}/partners"))
            others = [answers[j][0][: longest - len(prompt)] for j, prompt in zip(partners, prompts, strict=True)]
            answers = [[own, other] for (own,), other in zip(answers, others, strict=True)]
            extra["desirable"] = np.asarray([records[i]["label"] for i in kept])
        if part == "train":
            extra |= {name: column[kept] for name, column in owners_of(context, records, data).items()}
        counts = {"dropped": np.asarray(len(records) - len(kept)), "skipped": np.asarray(skipped)}
        save_arrays(file, {**pad_answers(prompts, answers), **extra, **counts})

    context.once(file, build)
    with np.load(file) as saved:
        return dict(saved)


def _place(data: Rows, rows: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch as `training.preference` describes it; a row number of -1 is a padding record of weight 0."""
    at_most = data["answer_lengths"].max()

    def load(mine: np.ndarray) -> dict[str, np.ndarray]:
        wanted = rows[mine]
        tokens, lengths = data["tokens"][wanted], data["answer_lengths"][wanted]
        prompt_lengths = data["lengths"][wanted, 0] - lengths[:, 0]
        places = np.minimum(prompt_lengths[:, None] + np.arange(at_most), tokens.shape[-1] - 1)
        batch = {
            "tokens": tokens,
            "answers": np.take_along_axis(tokens, places[:, None, :], axis=2),
            "lengths": lengths,
            "prompt_lengths": prompt_lengths,
            "weight": np.ones(len(wanted), np.float32),
        }
        batch |= {name: data[name][wanted] for name in KEPT if name in data}
        return without_padding(batch, wanted, lengths=1, prompt_lengths=1)

    return place_batch(len(rows), load, mesh)


# --- the reference ---------------------------------------------------------------------------------------------------


def _is_start(config: Any) -> bool:
    return config.reference in ("", config.init)


def _reference_identity(context: Context, start: Role) -> str:
    """What tells one reference from another, known without loading it."""
    config = context.config
    if _is_start(config):
        return json.dumps({name: fingerprint(part) for name, part in start.weights.items()})
    if is_folder(context.experiment.stages, config.reference):
        return folder_identity(context.path(config.reference))
    return json.dumps(read_info(context.workdir, config.reference)["fingerprints"])


def _load_reference(context: Context, start: Role, mesh: Mesh) -> Role:
    """The reference on the mesh, computed in the stage's dtypes: `start`, the policy before training, or as named."""
    config = context.config
    if _is_start(config):
        return start
    loaded = context.load(config.reference, mesh)
    if loaded.tokenizer.identity != start.tokenizer.identity:
        raise UserError(
            f'stages.{context.name}.reference "{config.reference}" has another tokenizer than init "{config.init}": '
            "name a model with the same one"
        )
    return continue_role(loaded, loaded.spec.lora, config.compute, key=context.key("adapters"))


def _score_reference(context: Context, reference: Role, data: Rows, mesh: Mesh) -> np.ndarray:
    """The reference's log-probability of every row's answer: (n, 2) float32, at the shape of a microbatch."""
    score = jax.jit(partial(summed_logprobs, reference.spec))
    count, size = len(data["lengths"]), context.config.batch_size // context.config.accumulation
    parts = [score(reference.weights, _place(data, rows, mesh)) for rows in in_batches(count, size)]
    return np.concatenate([fetch(part) for part in parts])[:count]


def _precompute_reference(context: Context, start: Role, parts: dict[str, Rows], mesh: Mesh) -> None:
    """Puts "reference" (n, 2) into the rows of each part: read from the stage's folder, or scored once and kept there.

    What was kept of another reference is scored anew. A base that only the reference reads is let go.
    """
    identity, reference = _reference_identity(context, start), None
    for name, data in parts.items():
        file = context.folder / "data" / f"reference_{name}.npz"
        if as_process_0(file.exists()):
            with np.load(file) as saved:
                if str(saved["identity"]) == identity:
                    data["reference"] = saved["logprobs"]
                    continue
        reference = reference or _load_reference(context, start, mesh)
        context.progress(f"reference log-probabilities of {len(data['lengths'])} {name} records")
        data["reference"] = _score_reference(context, reference, data, mesh)
        if is_main_process():
            save_arrays(file, {"logprobs": data["reference"], "identity": np.asarray(identity)})
        barrier(f"reference {name}")
    for key in [key for key, base in context.bases.items() if base is not start.weights["base"]]:
        del context.bases[key]


# --- the stage -------------------------------------------------------------------------------------------------------


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    config = context.config
    context.check_rows("batch_size / accumulation", config.batch_size // config.accumulation)
    context.check_folders()
    context.check_data(config.schema)


def preview(context: Context, tokenizer: Tokenizer) -> list[str]:
    """The first records' answers as training reads them."""
    config, out = context.config, []
    for record in context.stream(config.data, config.schema, 3):
        names: tuple[str, ...] = ("chosen", "rejected")
        if config.schema == "unpaired":
            names = ("desirable" if record["label"] else "undesirable",)
        answers = zip(names, answers_of(config.schema, record), strict=True)
        shown = {n: completion_example(tokenizer, record["prompt"], a, "completion") for n, a in answers}
        out.append("\n".join(f"{name}: {show_example(tokenizer, example)}" for name, example in shown.items()))
    return out


def run(context: Context) -> dict[str, Any]:
    """Trains, and returns the stage's figures."""
    config, mesh = context.config, context.mesh()
    settings = preference_config(config)
    with jax.set_mesh(mesh):
        # --- roles and rows --------------------------------------------------------------------------------------
        start = context.load(config.init, mesh)
        role = continue_role(start, context.lora(), config.compute, key=context.key("adapters"))
        del start
        training = _make_rows(context, role, config.data, "train")
        parts = {"train": training}
        if config.evaluation.data:
            parts["evaluation"] = _make_rows(context, role, config.evaluation.data, "evaluation")
        records, noun = len(training["lengths"]), "answers" if settings.loss == "kto" else "pairs"
        private = Private.of_records(context, *units_of(context, training)) if is_private(config) else None
        steps = private.iterations if private else steps_of(config, records)
        context.progress(
            f"{records} {noun} ({int(training['dropped'])} dropped: equal answers, or too long), {steps} steps"
        )
        reference, anchors = None, {}
        if settings.has_reference:
            anchors["reference"] = _reference_identity(context, role)
            if config.precompute_reference:
                _precompute_reference(context, role, parts, mesh)
            else:
                reference = _load_reference(context, role, mesh)

        # --- step ------------------------------------------------------------------------------------------------
        reference_spec = reference.spec if reference else None
        if private:
            objective = preference_objective(settings, role.spec, reference_spec)
            gradient = private.gradient(objective, role, 2 * training["tokens"].shape[-1])
        else:
            gradient = preference_gradient(settings, role.spec, reference_spec, config.accumulation)
        state, fixed, step = prepare(context, role, gradient, steps, mesh)
        frozen = {"policy": fixed, "reference": reference.weights if reference else {}}
        frozen["coefficients"] = jax.device_put(settings.coefficients, replicated(mesh))
        roles = {"policy": {**state.params, **fixed}} | ({"reference": frozen["reference"]} if reference else {})
        memory = role_memory(roles)
        context.progress(describe_memory(memory))
        # The state is a copy: what policy and reference do not read goes.
        role.weights, roles, reference = fixed, {}, None
        context.bases.clear()

        def place(rows: np.ndarray, epochs: np.ndarray) -> dict[str, jax.Array]:
            return _place(training, rows, mesh)

        batch = private.batches(place, mesh) if private else ordered(context, records, place)

        def advance(state: Any, iteration: int) -> tuple[Any, dict[str, jax.Array]]:
            return step(state, frozen, batch(iteration))

        evaluate = None
        if config.evaluation.data:
            evaluate = _evaluation(
                settings, role.spec, reference_spec, frozen, parts["evaluation"], config.batch_size, mesh
            )
            evaluate = follow_secrets(context, role, lambda params: {**fixed, **params}, evaluate, mesh)

        # --- loop ------------------------------------------------------------------------------------------------
        params, summary = train(
            context,
            state,
            advance,
            evaluate,
            iterations=steps,
            shown=("loss/train", "rewards/margins", "rewards/accuracies", "loss/eval", "accuracy/eval"),
            tokens_each=2 * config.batch_size * training["tokens"].shape[-1],
            flops_each=config.batch_size * _flops_each(settings, role.spec, training, reference_spec is not None),
            anchors=anchors,
            account=private.account if private else None,
        )
        role.weights = {**fixed, **params}
        prints = save_role(context.workdir, context.name, role)
    figures: dict[str, Any] = {
        noun: records,
        "dropped": int(training["dropped"]),
        "skipped": int(training["skipped"]),
        "trainable_parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps": steps,
        "loss": settings.loss,
        **(private.figures() if private else {}),
    }
    if config.evaluation.data:
        figures |= accuracy_figures(noun, len(parts["evaluation"]["lengths"]), summary)
        figures |= {
            "margin": summary["result"]["eval/rewards/margins"],
            "margin_start": summary["first"]["eval/rewards/margins"],
            "result_step": summary["result_step"],
        }
    return {"figures": figures | {"fingerprints": prints, "memory": memory}, "samples": []}


def _flops_each(settings: PreferenceConfig, spec: RoleSpec, data: Rows, scores_reference: bool) -> float:
    """FLOPs a record: both rows trained on (of kto the first one, and the second read), and by the reference read."""
    width, answer = data["tokens"].shape[-1], int(data["answer_lengths"].max())
    body = spec.config.forward_flops(width, logits=False)
    head = spec.config.forward_flops(width) - body
    passes = training_passes(spec) + (1 if settings.loss == "kto" else training_passes(spec))
    return (passes + 2 * scores_reference) * (width * body + answer * head)


def _evaluation(
    settings: PreferenceConfig,
    spec: RoleSpec,
    reference: RoleSpec | None,
    frozen: Any,
    held_out: Rows,
    size: int,
    mesh: Mesh,
):
    """The function (params, iteration) -> figures over the held-out records; kto's KL is of each batch."""
    batches = [_place(held_out, rows, mesh) for rows in in_batches(len(held_out["lengths"]), size)]
    objective = preference_objective(settings, spec, reference)

    @jax.jit
    def totals(params: Any, frozen: Any, batch: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
        if settings.loss == "kto":
            batch = with_kl(spec, reference, params, frozen, batch)
        return objective(params, frozen, batch).metrics

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        sums = jax.tree.map(lambda *x: sum(x), *[totals(params, frozen, batch) for batch in batches])
        means = {name: float(value) for name, value in with_margins(mean_metrics(sums)).items()}
        row = {"loss/eval": means["loss/train"], "accuracy/eval": means["rewards/accuracies"]}
        return row | {f"eval/{name}": means[name] for name in EVALUATED}

    return evaluate
