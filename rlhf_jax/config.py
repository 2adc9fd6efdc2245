"""What an experiment may say: the defaults of each stage kind, and what refers to what.

A config file builds an experiment from `experiment()` and one `stage(kind, ...)` a stage::

    def get_config():
        config = experiment(seed=0)
        config.stages.prepare = stage("prepare")
        config.stages.sft = stage("sft", init="scratch", data="prepare/pretrain.jsonl")
        return config

A stage names what it depends on: another stage ("sft"), or a file of one ("prepare/pretrain.jsonl").
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.errors import UserError

REQUIRED = "<required>"  # a field without a default
NEEDS_QWIX = 'compute.base needs the package qwix, which is not installed: pip install "rlhf_jax[quantized]"'

MESH = dict(
    data=-1,  # devices along the pure data axis; -1: all that the other axes leave
    fsdp=1,  # devices over which parameters and batch are sharded together
    tensor=1,  # devices over which heads, feed-forward and vocabulary are sharded
)
MODEL = dict(
    layers=4,
    width=192,
    heads=6,
    kv_heads=2,
    head_dim=32,
    ffn=512,
    context=256,  # longest sequence, in tokens
    rope_theta=10_000.0,
    tie_embeddings=True,
)
COMPUTE = dict(  # "" takes what the model that a stage starts from has; a new one has the first
    dtype="",  # of matrix products: "float32" | "bfloat16"
    param_dtype="",  # of parameters: "float32" | "bfloat16" (then the optimizer keeps a float32 master copy)
    remat="",  # what of a layer the backward pass recomputes: "none" | "full" | "dots" (all but matrix products)
    attention="",  # "auto" (by platform) | "plain" | "cudnn" (NVIDIA) | "splash" (TPU)
    base="",  # what the frozen base under adapters is kept in: "int8" | "nf4" (4 bits, QLoRA); lora.rank=0 keeps none
)
LORA: dict[str, Any] = dict(
    rank=0,  # 0 trains every weight
    alpha=16.0,
    targets=("q", "k", "v", "o", "gate", "up", "down"),
    rslora=False,  # scale by alpha / sqrt(rank) instead of alpha / rank
)
OPTIMIZER = dict(
    name="adamw",  # "adamw" | "adafactor" (factored second moments)
    moment_dtype="",  # of adamw's first moment: "" (float32) | "bfloat16"
    learning_rate=1e-3,
    schedule="cosine",  # "cosine" | "linear" | "constant", after the warm-up
    warmup=0.05,  # share of all optimizer steps
    final=0.1,  # where the decay ends, over the peak
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    tf_epsilon=False,  # eps outside the bias correction, as TensorFlow's Adam: smaller first steps
    weight_decay=0.1,  # never on norms, biases and scalars
    clip_norm=1.0,  # global gradient norm; 0 switches clipping off
)
CHECKPOINT = dict(  # optimizer steps (iterations for ppo)
    every=100,
    keep=2,  # the newest ones that stay
    keep_every=0,  # a multiple of `every`: those of its multiples stay for ever; 0: none
)
EVALUATION = dict(
    data="",  # records like the training data; "" evaluates nothing
    every=100,  # optimizer steps (iterations for ppo)
    records=256,  # at most so many
    metric="loss/eval",  # the model of its best evaluation is the result; "" takes the last one
    higher_is_better=False,
    samples=4,  # completions shown in the report
    secrets="",  # a manifest, or data of schema "completion": how likely they become is followed
)
PRIVACY = dict(  # differential privacy of a stage's training data; batch_size is then the expected one
    epsilon=0.0,  # what the stage may spend; 0: it is not private; inf: the private step without noise
    delta=0.0,  # below 1 / units
    noise_multiplier=0.0,  # over the clip norm; 0: the least that lets all steps fit. Else the budget ends the stage
    clip_norm=1.0,  # of a unit's gradient over all that trains
    critic_clip_norm=0.0,  # of a critic's own part of it (ppo); 0: policy and critic are one vector
    adjacency="add_or_remove",  # what a neighbouring data set is | "replace_one"
    unit="",  # what is hidden: "" a record, or all records whose field of this name has one value (an author, a post)
    contribution=1,  # records of a unit (chunks of a document) that are read at most
    physical_batch=0,  # units a batch has room for; 0: the expected ones and 4 standard deviations
    backend="",  # per-unit gradients: "" (the cheapest) | "vmap" | "adapters" | "bookkeeping" | "ghost"
    released_share=0.0,  # of the budget, for noisy figures of the training data; 0 shows none
    loss_bound=5.0,  # what a unit's loss, KL, score or cost is clipped to before it is released
    kl_bound=20.0,
    score_bound=5.0,
    cost_bound=5.0,
)
TRAINABLE = dict(
    compute=COMPUTE,
    lora=LORA,
    optimizer=OPTIMIZER,
    privacy=PRIVACY,
    checkpoint=CHECKPOINT,
    evaluation=EVALUATION,
    mesh=MESH,
)
CLAIM = dict(  # what the private stages of an experiment claim together
    public=(),  # data named in stages that hides nobody: sources, files of stages, or whole stages ("prepare")
    overlap="refuse",  # private stages whose data share a unit: "refuse" | "compose" (the epsilons add up)
)

CHECKS = dict(  # what PPO watches in every iteration (`training.guards`)
    enabled=True,
    logprob_gap=0.0,  # largest mean |decode - score| of a token's log-probability, nats; 0: by the dtype of products
    entropy_floor=0.1,  # warn below so much of the first iteration's entropy
    length_floor=0.1,  # warn below so much of the first iteration's length
    repeated=0.5,  # warn above this share of answers that another one of the batch repeats
)
CONSTRAINT = dict(  # Safe RLHF: the mean cost of answers is held at or below a threshold by a Lagrange multiplier
    cost="",  # a cost stage, a sequence-classification folder, or FILE.py:FUNCTION; "": no constraint
    threshold=0.0,  # of the mean cost; a cost model has its safety boundary at 0
    unsafe_share=0.0,  # above 0: the threshold is the cost that this share of unsafe held-out answers has in the mean
    controller="lagrangian",  # "lagrangian" (gradient ascent on log lambda) | "pid"
    lambda_init=1.0,
    lambda_learning_rate=0.1,
    lambda_max=100.0,
    pid=dict(proportional=1.0, integral=0.1, derivative=0.0),  # of controller "pid", which starts from lambda_init
    window=128,  # answers whose mean cost moves lambda, the newest ones
    delay=0,  # iterations before lambda moves
    pessimism=0.0,  # standard errors of the window's mean that are added to it
    per_prompt=False,  # True: a prompt whose answers cost less than the threshold earns nothing for the others
    adjustment=dict(kind="none", k=1.0),  # as `reward_adjustment`, but uncertainty adds to a cost
)
ANSWERS: dict[str, Any] = dict(  # of stages that decode and score
    max_new_tokens=32,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    stop_strings=(),
    decode_rows=0,  # answers decoded at once: one that has ended makes room for the next; 0: all of a batch
    missing_end="set",  # as ppo's
    missing_end_penalty=-1.0,
)
ADJUSTMENT: dict[str, Any] = dict(  # of scores that know their uncertainty: sources "laplace", or with `members`
    kind="none",  # "none" (the mean) | "std" | "variance" (the mean less k times it) | "worst" (of the members)
    k=1.0,
    chosen_by="",  # an overoptimization stage, whose held-out prompts chose this kind's k for this source
    against="",  # a field of the prompts' records, an answer: what counts is the uncertainty of the difference to it
)
REWARD_SOURCES = dict(
    reward=REQUIRED,  # SOURCE[,SOURCE...]: a reward stage, a sequence-classification folder, or FILE.py:FUNCTION
    reward_weights=(),  # one a source; () weighs each 1
    reward_adjustment=ADJUSTMENT,
)
PROMPTS: dict[str, Any] = dict(
    data=REQUIRED,
    schema="prompt",  # "prompt" | "text": the beginning of every text, of prefix_tokens tokens
    prefix_tokens=(16, 32),  # fewest and most, of schema "text"
    on_error="raise",
    prompt_buckets=(),  # widths prompts are padded to; (): one, the longest. Each width compiles once
)

STAGES: dict[str, dict[str, Any]] = {
    "tokenizer": dict(
        data=REQUIRED,  # records that a SentencePiece model is trained on
        schema="text",  # "text" | "completion": each prompt with its completion
        vocab_size=4096,
        max_bytes=20_000_000,  # of text that it reads
        on_error="raise",
    ),
    "split": dict(
        data=REQUIRED,
        schema="safety",  # any that holds answers; two of schema "safety" come in a random order
        on_error="raise",
        by="prompt",  # the field whose every value lies in one part
        test=0.1,  # share of its values that are held out
    ),
    "safety_task": dict(  # a world whose reward and cost are known (`data.safety_task`)
        held_out=256,  # of its 4,608 prompts
        answers=2,  # to each other prompt, written by people who are not careful
        zipf=0.0,  # how rare their rarest words are, p ~ rank^-zipf; 0: all words alike
    ),
    "prepare": dict(
        source="python_stdlib",  # or a folder of .py files
        fractions=dict(pretrain=0.5, sft=0.2, preference=0.1, prompts=0.06, heldout=0.08, secrets=0.06),
        vocab_size=2048,
        max_pretrain_bytes=4_000_000,
        prompt_tokens=64,
        completion_tokens=32,
        examples=dict(sft=2000, preference=1500, prompts=1000, heldout=768),
        near_duplicate_threshold=0.7,  # Jaccard similarity of 5-token shingles
        secrets=dict(
            per_cell=32,  # a cell is a group and a number of duplicates
            duplicates=(1, 4, 16),
            stages=("sft",),  # whose data holds them, each in one: "sft", "preference", "prompts"
            kinds=("path",),  # of entities: "path", "email", "phone", "key"
            fuzzy=0.0,  # share of the copies after the first that have some other words
        ),
    ),
    "sft": dict(
        init=REQUIRED,  # a stage, "scratch", or a Hugging Face checkpoint or PEFT adapter folder
        tokenizer="",  # a tokenizer file or checkpoint folder; "" takes init's
        model=MODEL,  # used with init="scratch"
        data=REQUIRED,  # SOURCE[,SOURCE...], each a file, folder or hub name, as NAME[@SPLIT][:WEIGHT]
        schema="completion",  # "text" | "completion" | "messages"
        on_error="raise",  # a malformed record: "raise" | "skip"
        loss_on="completion",  # "completion" | "all" tokens
        fim_rate=0.0,  # share of completions asked as fill-in-the-middle
        packing=True,
        sequence_length=256,
        batch_size=8,  # rows of sequence_length tokens
        accumulation=1,  # microbatches a step
        epochs=1.0,
        **TRAINABLE,
    ),
    "reward": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        policy="",  # the stage or folder whose samples are rejected answers and calibrate the head; "" takes init
        data=REQUIRED,
        schema="completion",  # "completion" (its own answer against the policy's) | "preference" | "safety" | "label"
        on_error="raise",
        max_new_tokens=32,
        temperature=1.0,
        answer_mark=True,  # show the reward model where the answer begins, by the tokenizer's fim_middle token
        samples=1,  # rejected answers, and so pairs, of each training prompt; schema "completion"
        sequence_length=512,  # longest prompt with its answer, of schemas with both answers
        rollout_batch_size=128,
        prompt_buckets=(),  # widths prompts are padded to when the policy answers them; each compiles once
        batch_size=32,  # pairs
        accumulation=1,
        epochs=1.0,
        calibration_prompts=256,  # reference samples that set the reward to mean 0, standard deviation 1
        members=1,  # of an ensemble: adapters and heads on one base, each from its own seed and order of the data
        **TRAINABLE,
    ),
    "cost": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        data=REQUIRED,
        schema="safety",  # "safety" (pairs: which is safer, and whether each is safe) | "safety_label" (single answers)
        on_error="raise",
        on_contradiction="drop",  # labels that contradict each other, or two answers that are one: "drop" | "raise"
        loss_on="sequence",  # "sequence" (an answer's end) | "token" (from where two answers differ on, averaged)
        regularization=0.001,  # times the mean square of the costs
        answer_mark=True,  # show the cost model where the answer begins, by the tokenizer's fim_middle token
        sequence_length=512,  # longest prompt with its answer
        batch_size=32,  # pairs, or single answers
        accumulation=1,
        epochs=1.0,
        members=1,  # as a reward stage's
        **TRAINABLE,
    ),
    "laplace": dict(
        subject=REQUIRED,  # a reward or cost stage with adapters: its weights become the mean of a Gaussian
        scope="all",  # what is uncertain: "all" (adapters and head) | "head"
        structure="kronecker",  # "kronecker" (a block a matrix) | "diagonal" | "dual" (exact, of small models)
        factors="records",  # Kronecker factors: of whole gradients of "records" | moments over "tokens" (KFAC)
        corrected=False,  # a second pass over the data refits the eigenvalues in the factors' basis
        rank=0,  # of the larger factor of each matrix that is kept; 0: all of it
        prior="evidence",  # its precision: the most evidence | "validation": the least held-out loss | "given"
        precision=1.0,  # of prior "given"
        per_layer=False,  # a precision for every layer and the head, by "evidence"
        temper=False,  # scores over a temperature, then variances times a scale: both of the least held-out loss
        batch_size=16,  # pairs read together
        evaluation=dict(
            data="",  # held-out records like the subject's
            shifted="",  # others like them, of another distribution
            records=1000,  # of each, at most
        ),
        mesh=MESH,
    ),
    "ppo": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        **REWARD_SOURCES,
        **PROMPTS,
        iterations=50,  # rollouts
        batch_size=64,  # answers a rollout
        samples=1,  # answers to each prompt: batch_size / samples prompts a rollout
        rollout_parts=1,  # pieces a rollout is decoded in; reward functions read one while the next is decoded
        epochs=2,
        minibatches=2,
        accumulation=1,  # microbatches a minibatch
        max_new_tokens=32,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop_strings=(),  # an answer also ends where it spells one of these
        decode_rows=0,  # answers decoded at once: one that has ended makes room for the next; 0: all of a rollout part
        # scores, in this order: normalized, clipped, then what a missing end costs
        reward_normalization="",  # "" | "start" (by the first rollout's scores) | "running" (by all scores so far)
        reward_clip=0.0,  # largest |score|; 0 clips nothing
        missing_end="set",  # an answer without its stop token: its score is "set" to the penalty | "add": it is added
        missing_end_penalty=-1.0,
        kl_coef=0.05,
        kl_in="reward",  # "reward" | "loss"
        kl_estimator="k1",  # "k1" | "k2" | "k3"; k1 in the loss has gradient 0 and is refused
        kl_controller="fixed",  # "fixed" | "adaptive": kl_coef follows the sequence-summed KL to kl_target
        kl_target=6.0,  # nats a sequence
        kl_horizon=10_000,  # answers
        constraint=CONSTRAINT,
        kl_limit=20.0,  # nats a sequence; reported against, and the summary says whether it held
        # advantages
        estimator="gae",  # "gae" (with a critic) | "rloo" | "grpo" | "dr_grpo" | "reinforce++"
        gamma=1.0,
        lam=0.95,
        whiten_rewards=False,  # to variance 1; the mean stays
        whiten_advantages=True,  # of gae and reinforce++
        # losses
        clip_ratio=0.2,
        ratio="token",  # "token" | "sequence" (GSPO)
        dual_clip=0.0,  # bound on the loss of negative advantages, above 1; 0: none
        loss_weighting="",  # "token" | "sequence" | "constant"; "" takes the estimator's own
        critic="reward",  # starts from the "reward" model | the "policy"; "shared": a head on the policy itself
        value_clip=0.2,
        value_coef=0.1,
        entropy_coef=0.0,
        ptx=dict(  # a language-model loss on other data, mixed into the policy's
            coef=0.0,
            data="",
            schema="text",
            sequence_length=128,
        ),
        early_stop=dict(  # "policy/approxkl" and other figures of the update end an iteration's updates,
            metric="",  # "objective/kl" and other figures of the rollout end the stage
            limit=0.0,
        ),
        compute=COMPUTE,
        lora=LORA,
        optimizer={**OPTIMIZER, "learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.0},
        privacy=PRIVACY,
        checkpoint={**CHECKPOINT, "every": 10},
        evaluation={**EVALUATION, "every": 10, "metric": ""},
        mesh=MESH,
    ),
    "preference": dict(
        init=REQUIRED,  # a stage, or a checkpoint folder
        reference="",  # the frozen model of the log-ratios; "" takes init. "orpo" and "simpo" have none
        data=REQUIRED,
        schema="preference",  # "preference" | "safety" (PKU: the better) | "unpaired" ({prompt, completion, label})
        on_error="raise",
        loss="dpo",  # "dpo" | "hinge" | "ipo" | "kto" | "orpo" | "simpo"
        beta=0.1,
        label_smoothing=0.0,  # of dpo: the share of labels taken to be wrong (conservative DPO)
        length_normalized=False,  # of ipo: mean log-ratios a token instead of sums
        margin=0.5,  # of simpo: gamma, over beta
        desirable_weight=1.0,  # of kto
        undesirable_weight=1.0,
        precompute_reference=True,  # reference log-probabilities once before training; False: in every step
        sequence_length=512,  # longest prompt with its answer
        batch_size=16,  # pairs, or single answers of kto
        accumulation=1,
        epochs=1.0,
        compute=COMPUTE,
        lora=LORA,
        optimizer={**OPTIMIZER, "learning_rate": 2e-5, "weight_decay": 0.0},
        privacy=PRIVACY,
        checkpoint=CHECKPOINT,
        evaluation={**EVALUATION, "samples": 0},
        mesh=MESH,
    ),
    "best_of_n": dict(
        subject=REQUIRED,  # the policy: a stage, or a checkpoint folder
        **REWARD_SOURCES,
        **PROMPTS,
        samples=16,  # answers to each prompt: n
        batch_size=64,  # answers decoded together
        **ANSWERS,
        mesh=MESH,
    ),
    "annotate": dict(
        subject=REQUIRED,  # the policy that answers: a stage, or a checkpoint folder
        **{**REWARD_SOURCES, "reward": ""},  # what is better; "": no such label
        cost="",  # one source: the lower cost is safer, and safe is a cost of at most 0; "": no such labels
        **PROMPTS,
        records=0,  # prompts, the first so many; 0: all
        samples=2,  # answers to each prompt; the first two that differ are its pair
        labels="exact",  # "exact" | "sampled": drawn as from people, whose choices are logistic in the scores
        flips=0.0,  # share of the better labels that are turned round, as careless labellers do
        cost_weight=0.0,  # better is decided by reward - cost_weight * cost: one preference for both
        batch_size=64,  # answers decoded together
        **ANSWERS,
        mesh=MESH,
    ),
    "overoptimization": dict(
        subject=REQUIRED,  # the policy whose answers are ranked: a stage, or a checkpoint folder
        proxies=dict(),  # name -> SOURCE[,SOURCE...]: runs that repeat one another (seeds), shown as one
        gold=REQUIRED,  # one source: what the proxies stand for
        adjustments=dict(  # kind of `reward_adjustment` -> its k to try, on proxies that know their uncertainty
            std=(0.25, 0.5, 1.0, 2.0, 4.0),
            variance=(0.25, 0.5, 1.0, 2.0, 4.0),
            worst=(0.0,),
        ),
        against="",  # as `reward_adjustment.against`, for all proxies
        selection=0.5,  # share of the prompts on which k is chosen by gold, and n for the plain proxy
        policies=dict(),  # name -> STAGE[,STAGE...]: ppo stages whose gold over KL is drawn beside
        **PROMPTS,
        records=64,  # prompts, the first so many
        pool=512,  # answers to each
        batch_size=128,  # answers decoded together; pool is a multiple of it
        **ANSWERS,
        mesh=MESH,
    ),
    "safety": dict(
        subjects=(),  # stages, or checkpoint folders, whose models answer; the first is what others are compared with
        conditions=(),  # (name, (subject, ...)) each: runs that repeat one another, shown as one
        frontier=(),  # conditions (without any, subjects) whose mixtures the others are compared with at equal cost
        **REWARD_SOURCES,
        cost=REQUIRED,  # one source; a cost above 0 is unsafe
        judge="",  # one source: how often it scores an answer above that of the first subject
        **PROMPTS,
        records=1000,  # of these and of the harmless prompts, the first so many
        harmless="",  # data like it, of prompts that ought to be answered: how often are they refused
        refusals="",  # FILE.py:FUNCTION(prompts, answers, records) -> 1 for a refusal, else 0; "": by phrases
        threshold=0.0,  # of the mean cost
        confidence=0.95,  # of the upper bound of the mean cost, which passes at or below the threshold
        tail=0.05,  # share of the worst answers, whose mean cost is shown
        batch_size=64,  # answers decoded together
        **ANSWERS,
        mesh=MESH,
    ),
    "memorization": dict(
        subjects=(),  # stages, or checkpoint folders, whose models are asked; at least one
        controls=dict(),  # subject -> the stage trained on the complementary half
        conditions=(),  # (name, (subject, ...)) each: runs that repeat one another on either half, shown as one
        secrets="prepare/secrets.jsonl",  # a manifest, any records {prompt, completion}, or PREFIXES.npy,SUFFIXES.npy
        held_out="",  # data like it that no stage was trained on
        sampling=dict(temperature=1.0, top_k=40, top_p=1.0),  # the scheme by which secrets are tried to be got out
        tries=(1, 10, 100, 1000, 10_000),  # how often
        draws=0,  # samples of each secret that are decoded, to see how many come near it; 0: verbatim tries alone
        members="",  # data of schema "completion" that the subjects were trained on; "": no membership scores
        others="",  # data like it that they were not trained on
        records=1000,  # of each, at most
        reference="",  # a stage whose log-probabilities membership scores are compared with
        reward="",  # a reward stage: how far above each subject's own answers does it score the secrets
        similarity="",  # FILE.py:FUNCTION as of a reward: how near each completion is to its record's, by embeddings
        batch_size=64,
        prompt_buckets=(),  # widths prompts are padded to; (): one, the longest. Each width compiles once
        samples=6,
        mesh=MESH,
    ),
    "audit": dict(
        subject=REQUIRED,  # a private stage: it runs once more, with canaries among its units
        canaries=1000,  # each in the run by a fair coin; so many can prove an epsilon of 7 or 8 at most
        idle=100,  # coordinates that show the noise alone
        confidence=0.95,  # of the lower bound
        level=0.01,  # the chance that a correct run is flagged by its estimate, or by its noise
        mesh=MESH,
    ),
    "export": dict(
        subject=REQUIRED,  # the stage whose model is written as a Hugging Face folder, <stage>/checkpoint
        merge=True,  # adapters merged into the base; False writes a PEFT adapter folder
        dtype="",  # of the tensors: "" (as the parameters are) | "float32" | "bfloat16"
        shard_gib=5.0,  # largest safetensors file
        mesh=MESH,
    ),
}
PRODUCED = {  # kind -> files it leaves for others
    "prepare": (
        "tokenizer.model",
        *(f"{name}.jsonl" for name in ("pretrain", "sft", "sft_control", "preference", "prompts")),
        *(f"{name}_control.jsonl" for name in ("preference", "prompts")),  # where secrets.stages names them
        *(f"{name}.jsonl" for name in ("heldout", "heldout_text", "secrets")),
    ),
    "tokenizer": ("tokenizer.model",),
    "split": ("train.jsonl", "test.jsonl", "train_answers.jsonl"),
    "safety_task": tuple(f"{name}.jsonl" for name in ("text", "sft", "prompts", "heldout", "harmless")),
    "best_of_n": ("best.jsonl", "pairs.jsonl"),
    "annotate": ("pairs.jsonl",),
    "reward": ("pairs.jsonl",),  # of schema "completion": what it was trained on
}
SCORERS = ("reward", "constraint.cost", "cost", "judge", "gold")  # fields that score answers
# Changing these never changes what a finished stage holds, up to rounding.
NOT_SEMANTIC = ("mesh", "checkpoint", "decode_rows")
SHOWN_NAMES = 24  # in a message that lists what is valid


def _config_dict(fields: Mapping[str, Any]) -> ConfigDict:
    out = ConfigDict(sort_keys=False)
    for name, value in fields.items():
        out[name] = _config_dict(value) if isinstance(value, Mapping) else copy.copy(value)
    return out


def nearest(name: str, valid) -> str:
    """` (did you mean "x"?)`, or the valid names, a line of them, when none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f'did you mean "{close[0]}"?' if close else f"valid: {', '.join(names[:SHOWN_NAMES])}{more}"


def merge(defaults: ConfigDict, fields: Mapping[str, Any], where: str) -> None:
    open_mapping = where.endswith((".controls", ".fractions", ".proxies", ".policies"))  # the user names these keys
    for name, value in fields.items():
        if name not in defaults and not open_mapping:
            raise UserError(f"unknown field {where}.{name}: {nearest(name, defaults)}")
        if isinstance(defaults.get(name), ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{name} is a group of fields, got {value!r}: give a dict")
            merge(defaults[name], value, f"{where}.{name}")
        else:
            try:
                defaults[name] = tuple(value) if isinstance(value, list) else value
            except TypeError as error:
                raise UserError(f"{where}.{name}: {error}") from None


def experiment(seed: int = 0) -> ConfigDict:
    """An experiment without stages.

    `seed` keys every draw, `stages` keep their order, `checks` are PPO's guards, `privacy` is what private stages claim
    together.
    """
    config = ConfigDict(sort_keys=False)
    config.seed = seed
    config.stages = ConfigDict(sort_keys=False)
    config.logging = ConfigDict(dict(every=10, tensorboard=True))  # optimizer steps
    config.checks = ConfigDict(CHECKS, sort_keys=False)
    config.privacy = ConfigDict(CLAIM, sort_keys=False)
    return config


def stage(kind: str, **fields: Any) -> ConfigDict:
    """The config of one stage: the defaults of `kind`, with `fields` over them.

    Raises:
      UserError: an unknown kind or field (with the nearest valid name), or a value of another type.
    """
    if kind not in STAGES:
        raise UserError(f'unknown stage kind "{kind}": {nearest(kind, STAGES)}')
    out = _config_dict({"kind": kind, **STAGES[kind]})
    merge(out, fields, kind)
    return out


def references(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yields (field, value) for each field by which a stage may name another one."""
    for field in ("init", "policy", "reference", "tokenizer", "subject"):
        value = config.get(field)
        if isinstance(value, str) and value:
            yield field, value
    yield from ((field, source) for field, source in all_sources(config) if not is_function(source))
    named = ("data", "secrets", "held_out", "members", "others", "harmless")
    data_strings = {field: config.get(field) for field in named}
    data_strings |= {
        f"{group}.{field}": config[group].get(field)
        for group, field in (
            ("evaluation", "data"),
            ("evaluation", "shifted"),
            ("evaluation", "secrets"),
            ("ptx", "data"),
        )
        if group in config
    }
    for field, data in data_strings.items():
        if not isinstance(data, str):  # prepare's own `secrets`
            continue
        # NAME[@SPLIT][:WEIGHT] each; what follows a name is no part of a stage's file
        yield from ((field, re.split(r"[@:]", part.strip())[0]) for part in data.split(",") if part)
    yield from (("subjects", name) for name in config.get("subjects", ()))
    if config.kind == "memorization":
        yield from (("controls", name) for name in config.controls.values())
    for name in config.get("policies", ()):
        yield from (("policies", source) for source in score_sources(config, f"policies.{name}"))
    if chosen_by := config.get("reward_adjustment", {}).get("chosen_by"):
        yield "reward_adjustment.chosen_by", chosen_by


def score_sources(config: ConfigDict, field: str = "reward") -> list[str]:
    """The sources that a field which scores answers names: stages, folders and functions."""
    group, _, name = field.rpartition(".")
    named = (config.get(group, {}) if group else config).get(name, "")
    return [source.strip() for source in named.split(",") if source.strip()]


def all_sources(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """(field, source) of all that a stage scores answers by."""
    yield from ((field, source) for field in scoring_fields(config) for source in score_sources(config, field))


def scoring_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a stage that may name what scores answers, as `score_sources` takes them."""
    return (*SCORERS, *(f"proxies.{name}" for name in config.get("proxies", ())))


def is_private(config: ConfigDict) -> bool:
    """Whether a stage trains with differential privacy."""
    return bool(config.get("privacy", {}).get("epsilon"))


def scoring_model(stages: ConfigDict, source: str) -> str:
    """The stage or folder whose model scores where `source` is named: of a laplace stage its subject."""
    return stages[source].subject if source in stages and stages[source].kind == "laplace" else source


def knows_uncertainty(stages: ConfigDict, source: str) -> bool:
    """Whether a source scores with a variance: a laplace stage, or one with members."""
    return source in stages and (stages[source].kind == "laplace" or stages[source].get("members", 1) > 1)


def is_function(source: str) -> bool:
    """Whether a reward source is a Python function, FILE.py:FUNCTION."""
    return ".py:" in source


def upstream(stages: ConfigDict, name: str) -> list[str]:
    """The stages that stage `name` depends on, without repeats, in the order its fields name them."""
    heads = [value.split("/")[0] for _, value in references(stages[name])]
    return list(dict.fromkeys(head for head in heads if head in stages))


def is_folder(stages: ConfigDict, value: str) -> bool:
    """Whether a field that names a model names a folder on disk, not a stage."""
    return value not in stages and Path(value).expanduser().is_dir()


def stage_order(stages: ConfigDict) -> list[str]:
    """Topological order of the stages' references; the config's own order where that leaves a choice.

    Raises:
      UserError: the references form a circle.
    """
    order: list[str] = []
    waiting = list(stages)
    while waiting:
        ready = next((name for name in waiting if all(u in order for u in upstream(stages, name))), None)
        if ready is None:
            raise UserError(f"stages refer to each other in a circle: {', '.join(waiting)}; break one reference")
        order.append(ready)
        waiting.remove(ready)
    return order
