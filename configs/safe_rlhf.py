"""Safe RLHF (Dai et al., arXiv 2310.12773): helpful under a constraint on harm, PPO with a Lagrange multiplier.

    python -m rlhf_jax.main --config=configs/safe_rlhf.py --workdir=runs/safe_rlhf

A small world in which helpfulness and harm are known exactly and pull against each other (`data.safety_task`): a first
policy answers, labels are drawn as from people, a reward and a cost model learn from them, and PPO is held to a mean
cost of 0 by a Lagrange multiplier ("lagrangian") and by a PID controller ("pid"). Beside it: PPO on the reward alone
("unconstrained"), on reward models of one preference for both, in which harm weighs as much as help ("mixed") or a
third ("mixed_third"), and on shaped rewards R - nu C, whose points of mean cost and reward make the frontier that the
others are held against; a mean cost of -1 ("strict"), and a cost of 0 for each prompt by itself ("each_prompt"). Three
seeds each; the world itself judges. 2 CPU cores: 40 minutes for 56 stages. Measured (true reward and cost, [95 % over
seeds]): lagrangian 1.73 [1.65, 1.82] at 0.72 [0.63, 0.82], pid 1.66 [1.63, 1.70] at 0.61 [0.53, 0.69], strict 1.24
[1.23, 1.26] at -0.08 [-0.10, -0.06], each 0.17 to 0.19 [0.12, 0.23] above the frontier at its cost; unconstrained 3.01
[2.89, 3.12] at 3.05 [3.00, 3.10]; mixed_third 2.12 at 1.87, mixed -0.45 at -2.24; each_prompt 0.67 at -0.33, 0.22 below
the frontier. The cost model's own mean is held at 0: what lies between 0 and 0.72 is where it is too mild.

    python -m rlhf_jax.main --config=configs/safe_rlhf.py:rounds=3 --workdir=runs/safe_rounds

The paper's outer loop: in every round the last policy answers again, both models are trained on all labels so far, and
the threshold is lowered. Measured with rounds=2: true cost 0.27, then -0.17 at a threshold of -0.25, reward 1.37, 1.38.

    python -m rlhf_jax.main --config=configs/safe_rlhf.py:FOLDER --workdir=runs/safe_pairs

Real pairs, FOLDER/safety-pairs/pku_safe_unsafe_5k.jsonl.gz {prompt, safe, unsafe} and hh_both_labels.jsonl.gz (which
answer is better and which safer, no safety labels), split by prompt into a part to train on and a part for the judges.
22 min 44 s on 2 CPU cores. A model of 0.4 million parameters hardly reads content: 60 % of the pairs are right
(60 % by lengths alone); the judges' mean cost 0.77 -> -0.20 [-0.21, -0.19] under the Lagrangian, -0.07 [-0.30, 0.16]
without a constraint.

    python -m rlhf_jax.main --config=configs/safe_rlhf.py:7b=CHECKPOINT,round=1,fsdp=16 --workdir=runs/beaver_1

The paper's sizes and its three rounds, on an instruction-tuned 7B Llama, with adapters where the paper trains six
models in full. It needs an accelerator and was not run here.

| | paper (v1 / v2 / v3) | official script | here (v1 / v2 / v3) |
|---|---|---|---|
| threshold -d | 0 / -3 / -3 | 0 | 0 / -3 / -3 |
| lambda: first, learning rate | 1, .01 / .5, .04 / 1, .04 | 1, .1 | 1, .01 / .5, .04 / 1, .04 |
| lambda at most | none | 5 | 1e6 |
| lambda reads the mean cost of | (not said) | 128 answers of each process | 128 answers, all processes' |
| lambda moves | after the policy's step | before it, every microbatch | after it, every rollout |
| KL coefficient | .1, half of it on each side | .01 on each side | .05, the effective weight |
| clip ratio, value clip, score clip | .1, 5, 50 | .2, 5, 50 | .1, 5, 50 (of the reward) |
| score clip acts on | (not said) | score and KL summed, of both sides | the reward alone: costs stay as they are |
| answers to a prompt, temperature | 2, 1.2 | 1, 1.0 | 2, 1.2 |
| repetition penalty | 1.2 | 1.0 | none: scores are of the plain distribution |
| prompts a rollout | 16, gradients of 8 (4, 8) summed | 16 | 64, microbatches of 16 answers |
| ptx coefficient, data | 8 / 2 / 1, Alpaca | 16, Alpaca | 8 / 2 / 1, Alpaca |
| gamma, GAE lambda | 1, .95 | 1, .95 | 1, .95 |
| learning rate of policy, of critics | 9.65e-6, 5e-6 | 1e-5, 5e-6 | 9.65e-6, both |
| loss of an answer | (not said) | mean over its tokens | over all tokens of the batch |
| reward and cost model | 2 epochs, 2e-5, L2 .001 | the same | the same; L2 on the cost alone |
| critics start from | reward and cost model | the same | the same, their heads from 0 |
| prompt | BEGINNING OF CONVERSATION: USER: ... ASSISTANT: | the same | as the records have it |
"""

from pathlib import Path

from rlhf_jax.config import experiment, stage
from rlhf_jax.data import safety_task

GOLD = {name: f"{safety_task.__file__}:gold_{name}" for name in ("reward", "cost", "refusal")}
SHAPING = (0.01, 0.5, 1, 2, 5, 10, 100)  # nu of the paper's sweep
MIXED = {"mixed": 1.0, "mixed_third": 1 / 3}  # weight of harm in one preference for both
LAMBDA = dict(lambda_init=0.5, lambda_learning_rate=0.1, lambda_max=20.0)
EACH_PROMPT = {**LAMBDA, "per_prompt": True, "lambda_max": 2.0}  # single answers violate it always: lambda ends there
PID = dict(
    controller="pid", lambda_init=0.5, lambda_max=20.0, pid=dict(proportional=0.3, integral=0.01, derivative=1.0)
)


def get_config(argument=""):
    """The known world ("", "small", "rounds=N"), real pairs ("FOLDER"), or the paper's sizes ("7b=FOLDER,round=N")."""
    if argument.startswith("7b="):
        return paper_size(argument)
    if argument and argument != "small" and not argument.startswith("rounds="):
        return real_pairs(Path(argument))
    config = experiment(seed=0)
    small = argument == "small"
    known_world(config.stages, small)
    if argument.startswith("rounds="):
        rounds(config.stages, int(argument.removeprefix("rounds=")))
    else:
        comparison(config.stages, seeds=1 if small else 3, shaping=(0.5, 1) if small else SHAPING, small=small)
    return config


# --- a world whose reward and cost are known ----------------------------------------------------------------------


def known_world(stages, small):
    """Prompts, a first policy, labelled pairs of its answers, and the models of reward and cost learned from them."""
    stages.task = stage("safety_task", answers=1 if small else 2)
    stages.tokenizer = stage("tokenizer", data="task/text.jsonl", vocab_size=512)
    stages.sft = stage(
        "sft",
        init="scratch",
        tokenizer="tokenizer/tokenizer.model",
        model=dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=192, context=64),
        data="task/sft.jsonl",
        sequence_length=64,
        batch_size=16,
        epochs=2.0,
        optimizer=dict(learning_rate=3e-3),
    )
    for name, data in (("pairs", "task/prompts.jsonl"), ("heldout_pairs", "task/heldout.jsonl")):
        stages[name] = annotated("sft", data)
    stages.reward = scored("reward", "pairs")
    stages.cost = scored("cost", "pairs")


def annotated(subject, data, **fields):
    """Pairs of a policy's answers with labels as people give them, who are logistic in the known reward and cost."""
    return stage(
        "annotate",
        subject=subject,
        data=data,
        reward=GOLD["reward"],
        cost=GOLD["cost"],
        labels="sampled",
        batch_size=256,
        max_new_tokens=14,
        missing_end="add",
        missing_end_penalty=0.0,
        **fields,
    )


def scored(kind, pairs, **fields):
    """A reward or cost model on pairs of schema "safety"."""
    return stage(
        kind,
        init="sft",
        data=f"{pairs}/pairs.jsonl",
        schema="safety",
        sequence_length=64,
        batch_size=32,
        epochs=2.0,
        optimizer=dict(learning_rate=1e-3),
        evaluation=dict(data="heldout_pairs/pairs.jsonl", every=100),
        **({"max_new_tokens": 14} if kind == "reward" else {}),
        **fields,
    )


def policy(iterations, **fields):
    """PPO on the world's prompts."""
    return stage(
        "ppo",
        **{"init": "sft", "data": "task/prompts.jsonl", "reward": "reward", **fields},
        iterations=iterations,
        batch_size=128,
        epochs=1,
        minibatches=2,
        max_new_tokens=14,
        missing_end="add",
        missing_end_penalty=-1.0,
        kl_coef=0.05,
        kl_limit=60.0,
        critic="policy",
        value_clip=5.0,
        optimizer=dict(learning_rate=5e-4, schedule="cosine", final=0.1),
        checkpoint=dict(every=50),
        evaluation=dict(data="task/heldout.jsonl", records=128, every=25),
    )


def comparison(stages, seeds, shaping, small):
    """PPO under the constraint, by both controllers, and beside it: no constraint, mixed labels, shaped rewards."""
    iterations = 60 if small else 200
    for name, weight in MIXED.items():
        stages[f"{name}_pairs"] = annotated("sft", "task/prompts.jsonl", cost_weight=weight)
        stages[f"{name}_heldout"] = annotated("sft", "task/heldout.jsonl", cost_weight=weight)
        stages[f"{name}_reward"] = scored("reward", f"{name}_pairs")
        stages[f"{name}_reward"].evaluation.data = f"{name}_heldout/pairs.jsonl"
    for seed in range(1, seeds + 1):
        stages[f"lagrangian_{seed}"] = policy(iterations, constraint=dict(cost="cost", **LAMBDA))
        stages[f"pid_{seed}"] = policy(iterations, constraint=dict(cost="cost", **PID))
        if not small:
            stages[f"strict_{seed}"] = policy(iterations, constraint=dict(cost="cost", threshold=-1.0, **PID))
            stages[f"each_prompt_{seed}"] = policy(iterations, constraint=dict(cost="cost", **EACH_PROMPT))
        for name in MIXED:
            stages[f"{name}_{seed}"] = policy(iterations, reward=f"{name}_reward")
        stages[f"unconstrained_{seed}"] = policy(iterations)
        for nu in shaping:
            name = f"shaped_{str(nu).replace('.', 'p')}_{seed}"
            stages[name] = policy(iterations, reward="reward,cost", reward_weights=(1.0, -float(nu)))
    subjects = tuple(name for name in stages if stages[name].kind in ("sft", "ppo"))
    runs: dict[str, list[str]] = {}
    for name in subjects:
        runs.setdefault(name.rpartition("_")[0] or name, []).append(name)
    conditions = tuple((name, tuple(seeds)) for name, seeds in runs.items())
    frontier = tuple(name for name in runs if name.startswith("shaped"))
    stages.safety = stage("safety", subjects=subjects, conditions=conditions, frontier=frontier, **judged())


def judged():
    """The known world's own judges."""
    return dict(
        reward=GOLD["reward"],
        cost=GOLD["cost"],
        judge=GOLD["reward"],
        refusals=GOLD["refusal"],
        data="task/heldout.jsonl",
        harmless="task/harmless.jsonl",
        batch_size=256,
        max_new_tokens=14,
        missing_end="add",
        missing_end_penalty=0.0,
    )


def rounds(stages, count):
    """The outer loop: each round's policy answers, people label, both models and the policy go on from there."""
    pairs = ["pairs"]
    previous = "sft"
    for number in range(1, count + 1):
        if number > 1:
            stages[f"pairs_{number}"] = annotated(previous, "task/prompts.jsonl")
            pairs.append(f"pairs_{number}")
            for kind in ("reward", "cost"):
                stages[f"{kind}_{number}"] = scored(kind, "pairs")
                stages[f"{kind}_{number}"].data = ",".join(f"{name}/pairs.jsonl" for name in pairs)
        models = {kind: kind if number == 1 else f"{kind}_{number}" for kind in ("reward", "cost")}
        threshold = -0.25 * (number - 1)  # stricter every round
        stages[f"ppo_{number}"] = policy(
            100,
            init=previous,
            reward=models["reward"],
            constraint=dict(cost=models["cost"], threshold=threshold, **PID),
        )
        previous = f"ppo_{number}"
    subjects = ("sft", *(f"ppo_{number}" for number in range(1, count + 1)))
    stages.safety = stage("safety", subjects=subjects, **judged())


# --- real pairs -----------------------------------------------------------------------------------------------------


def real_pairs(folder):
    """A decoder from scratch on the pairs' answers; reward, cost and PPO on one part of them, judges on the other."""
    config = experiment(seed=0)
    stages = config.stages
    for name, file in (("pku", "pku_safe_unsafe_5k"), ("hh", "hh_both_labels")):
        data = str(folder / "safety-pairs" / f"{file}.jsonl.gz")
        stages[name] = stage("split", data=data, test=0.4, on_error="skip")
    answers = "pku/train_answers.jsonl,hh/train_answers.jsonl"
    stages.tokenizer = stage("tokenizer", data=answers, schema="completion", vocab_size=2000)
    stages.sft = stage(
        "sft",
        init="scratch",
        tokenizer="tokenizer/tokenizer.model",
        model=dict(layers=2, width=96, heads=4, kv_heads=2, head_dim=24, ffn=256, context=224),
        data=answers,
        on_error="skip",
        sequence_length=192,
        batch_size=16,
        loss_on="all",
        epochs=3.0,
        optimizer=dict(learning_rate=2e-3),
    )
    models = dict(init="sft", schema="safety", sequence_length=160, on_error="skip", batch_size=32, epochs=2.0)
    models["optimizer"] = dict(learning_rate=5e-4)
    for part, other, suffix in (("train", "test", ""), ("test", "train", "_judge")):
        held_out = dict(every=50, records=512)
        reward = dict(data=f"hh/{other}.jsonl", metric="accuracy/eval", higher_is_better=True, **held_out)
        stages[f"reward{suffix}"] = stage("reward", data=f"hh/{part}.jsonl", evaluation=reward, **models)
        pairs = ",".join(f"{name}/{part}.jsonl" for name in ("pku", "hh"))
        cost = dict(data=f"pku/{other}.jsonl", **held_out)
        stages[f"cost{suffix}"] = stage("cost", data=pairs, evaluation=cost, **models)
    stages.cost_without_labels = stage(
        "cost", data="hh/train.jsonl", evaluation=dict(data="hh/test.jsonl", **held_out), **models
    )
    asked = dict(data="pku/train.jsonl,hh/train.jsonl", on_error="skip", max_new_tokens=48)
    for seed in (1, 2, 3):
        for name, constraint in (("lagrangian", dict(cost="cost", unsafe_share=0.2, **PID)), ("unconstrained", {})):
            stages[f"{name}_{seed}"] = stage(
                "ppo",
                init="sft",
                reward="reward",
                constraint=constraint,
                iterations=60,
                batch_size=64,
                epochs=1,
                kl_coef=0.05,
                missing_end="add",
                value_clip=5.0,
                optimizer=dict(learning_rate=3e-4),
                checkpoint=dict(every=30),
                evaluation=dict(data="pku/test.jsonl", records=64, every=30),
                **asked,
            )
    names = {name: tuple(f"{name}_{seed}" for seed in (1, 2, 3)) for name in ("lagrangian", "unconstrained")}
    stages.safety = stage(
        "safety",
        subjects=("sft", *names["lagrangian"], *names["unconstrained"]),
        conditions=(("sft", ("sft",)), *names.items()),
        reward="reward_judge",
        cost="cost_judge",
        judge="reward_judge",
        **{**asked, "data": "pku/test.jsonl"},
        harmless="hh/test.jsonl",
        records=256,
    )
    return config


# --- the paper's sizes ----------------------------------------------------------------------------------------------

ROUNDS = {  # of Beaver-v1, v2, v3
    1: dict(threshold=0.0, lambda_init=1.0, lambda_learning_rate=0.01, epochs=3, ptx=8.0),
    2: dict(threshold=-3.0, lambda_init=0.5, lambda_learning_rate=0.04, epochs=3, ptx=2.0),
    3: dict(threshold=-3.0, lambda_init=1.0, lambda_learning_rate=0.04, epochs=4, ptx=1.0),
}


def paper_size(argument):
    """One round on a 7B checkpoint; six roles are adapters and heads on its one base."""
    fields = dict(part.split("=", 1) for part in argument.split(","))
    checkpoint, numbers = fields["7b"], ROUNDS[int(fields.get("round", 1))]
    pairs = fields.get("pairs", "PKU-Alignment/PKU-SafeRLHF")
    lora = dict(rank=64, alpha=128.0)
    compute = dict(dtype="bfloat16", param_dtype="bfloat16", remat="full")
    shared = dict(init=checkpoint, lora=lora, compute=compute, mesh=dict(fsdp=int(fields.get("fsdp", 1))))
    config = experiment(seed=0)
    models = dict(
        data=f"{pairs}@train",
        schema="safety",
        sequence_length=512,
        on_error="skip",
        batch_size=16,
        epochs=2.0,
        optimizer=dict(learning_rate=2e-5, warmup=0.03, final=0.0, weight_decay=0.1),
        evaluation=dict(data=f"{pairs}@test", every=500, records=2048),
    )
    for kind in ("reward", "cost"):
        config.stages[kind] = stage(kind, **models, **shared)
    config.stages.ppo = stage(
        "ppo",
        reward="reward",
        data=f"{pairs}@train",
        iterations=700 * numbers["epochs"],  # of 128 answers to 64 prompts: an epoch of 44,600 prompts
        batch_size=128,
        samples=2,
        epochs=1,
        minibatches=1,
        accumulation=8,
        max_new_tokens=256,
        prompt_buckets=(128, 256),
        temperature=1.2,
        clip_ratio=0.1,
        value_clip=5.0,
        reward_clip=50.0,
        kl_coef=0.05,  # the paper's 0.1 on each half of the penalty
        missing_end="add",
        missing_end_penalty=0.0,
        whiten_advantages=False,
        constraint=dict(
            cost="cost",
            threshold=numbers["threshold"],
            lambda_init=numbers["lambda_init"],
            lambda_learning_rate=numbers["lambda_learning_rate"],
            lambda_max=1e6,
            window=128,
        ),
        ptx=dict(coef=numbers["ptx"], data="tatsu-lab/alpaca@train", schema="text", sequence_length=512),
        optimizer=dict(learning_rate=9.65e-6, schedule="cosine", warmup=0.03, weight_decay=0.01),
        evaluation=dict(data=f"{pairs}@test", every=100, records=512),
        **shared,
    )
    return config
