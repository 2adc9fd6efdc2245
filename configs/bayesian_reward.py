"""Reward models that know where they do not know, against over-optimization (Yang et al., arXiv 2402.13210).

    python -m rlhf_jax.main --config=configs/bayesian_reward.py --workdir=runs/bayesian_reward

A small world in which what an answer is worth is known exactly (`data.safety_task`, with words that are the rarer the
later they stand). A gold model learns it from many pairs; smaller proxies of two sizes learn from pairs that gold has
labelled, exactly or with 25 % of the labels turned round. Each is a MAP model, a Laplace posterior over its adapters,
an ensemble of five, and a posterior of each of these five. Best of 512 by each, plain and with its uncertainty against
a reference answer taken off, is scored by gold; PPO against the larger ones too. Three seeds each.

Measured on 2 CPU cores, 103 stages in 1 h 53 min with other jobs beside most of them. Larger proxies of noisy labels,
true worth of the best of 512 in standard deviations of the policy's answers: MAP 0.31 [-0.37, 0.99], which had 0.92
at n = 16, in all three runs; Laplace 1.43 [1.18, 1.68]; worst of the ensemble 1.39 [0.62, 2.16]; Laplace of its members
1.53 [0.71, 2.36]. By the gold model MAP 1.09 [0.56, 1.63], the others 1.44 to 1.60; clean all between 1.90 and 2.28.
Another machine rounds otherwise and so makes another world: README.md has both.

    python -m rlhf_jax.main --config=configs/bayesian_reward.py:small --workdir=runs/bayesian_small

One size, noisy labels, one seed, 16 prompts: 5 minutes. What uncertainty gains shows there; whether MAP falls is noise.

    python -m rlhf_jax.main --config=configs/bayesian_reward.py:FOLDER --workdir=runs/bayesian_pairs

Real pairs, FOLDER/hh-rlhf/helpful-base.jsonl.gz and harmless-base.jsonl.gz {chosen, rejected}: calibration of proxies
trained on helpful dialogues, held out there and on harmless ones. Seed 0: five members 0.61 nats at home, 0.83 to 0.91
abroad, where only 43 % are called right and the variance is no larger: README has the table. 127 minutes by the clocks
with other jobs on both cores.

    python -m rlhf_jax.main --config=configs/bayesian_reward.py:paper=POLICY,PROXY,GOLD,DATA --workdir=runs/paper

The paper's sizes on Coste et al.'s set-up (arXiv 2310.02743): checkpoint folders of a 1.4B policy, a 70M or 1.4B proxy
and a 7B gold reward model; DATA holds sft.jsonl, train_prompts.jsonl and heldout_prompts.jsonl. It needs an accelerator
and was not run here.
"""

from pathlib import Path

from rlhf_jax.config import experiment, stage
from rlhf_jax.data import safety_task

TRUE = f"{safety_task.__file__}:gold_reward"
ZIPF = 1.5
SIZES = {  # decoders: of the proxies, the second one also of the policy; and of gold
    "small": dict(layers=1, width=32, heads=2, kv_heads=1, head_dim=16, ffn=96, context=64),
    "medium": dict(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, ffn=192, context=64),
    "gold": dict(layers=3, width=128, heads=4, kv_heads=4, head_dim=32, ffn=384, context=64),
}
NOISE = {"clean": 0.0, "noisy": 0.25}
LORA = dict(rank=8, alpha=16.0)
MEMBERS = 5
PROXIES = {"MAP": "map", "Laplace": "laplace", "ensemble": "ensemble", "Laplace of ensemble": "both"}
POLICIES = {  # PPO runs: what rewards them, and what its uncertainty costs
    "PPO on MAP": ("map", "none"),
    "PPO on Laplace, std": ("laplace", "std"),
    "PPO on ensemble": ("ensemble", "none"),
    "PPO on ensemble, variance": ("ensemble", "variance"),
    "PPO on ensemble, worst": ("ensemble", "worst"),
}
ANSWER = dict(max_new_tokens=14, missing_end="add", missing_end_penalty=0.0)


def get_config(argument=""):
    """The known world ("", "small"), real pairs ("FOLDER"), or the paper's sizes ("paper=POLICY,PROXY,GOLD,DATA")."""
    if argument.startswith("paper="):
        return paper_size(*argument.removeprefix("paper=").split(","))
    if argument and argument != "small":
        return real_pairs(Path(argument))
    config = experiment(seed=0)
    small = argument == "small"
    known_world(config.stages, small)
    if small:
        compared(config.stages, "medium", "noisy", seeds=1, small=True)
        return config
    for size in ("small", "medium"):
        for noise in NOISE:
            compared(config.stages, size, noise, seeds=3)
    return config


# --- a world in which worth is known ---------------------------------------------------------------------------------


def known_world(stages, small):
    """Prompts, language models of three sizes, gold and what it says of pairs of the policy's answers."""
    stages.task = stage("safety_task", answers=2, zipf=ZIPF)
    stages.tokenizer = stage("tokenizer", data="task/text.jsonl", vocab_size=512)
    for name, model in SIZES.items():
        stages[f"lm_{name}"] = stage(
            "sft",
            init="scratch",
            tokenizer="tokenizer/tokenizer.model",
            model=model,
            data="task/sft.jsonl",
            sequence_length=64,
            batch_size=16,
            epochs=1.0 if small else 2.0,
            optimizer=dict(learning_rate=3e-3),
        )
    lots = [f"true_{i}" for i in range(1 if small else 4)]
    for name in lots:
        stages[name] = annotated(TRUE, labels="sampled")
    stages.true_heldout = annotated(TRUE, "task/heldout.jsonl", labels="sampled")
    stages.gold = reward_model("gold", ",".join(f"{name}/pairs.jsonl" for name in lots), "true_heldout")
    for noise, flips in NOISE.items():
        stages[f"pairs_{noise}"] = annotated("gold", flips=flips)
        stages[f"heldout_{noise}"] = annotated("gold", "task/heldout.jsonl", flips=flips)


def annotated(judge, data="task/prompts.jsonl", **fields):
    """A pair of the policy's answers to each prompt, the better by `judge` first."""
    return stage("annotate", subject="lm_medium", data=data, reward=judge, batch_size=256, **ANSWER, **fields)


def reward_model(size, data, held_out, **fields):
    """A reward model on pairs."""
    return stage(
        "reward",
        init=f"lm_{size}",
        policy="lm_medium",
        data=data,
        schema="preference",
        max_new_tokens=14,
        sequence_length=64,
        batch_size=32,
        epochs=2.0,
        evaluation=dict(data=f"{held_out}/pairs.jsonl", every=100),
        **{"optimizer": dict(learning_rate=1e-3), **fields},
    )


def compared(stages, size, noise, seeds, small=False):
    """Proxies of one size on pairs of one noise, ranking answers and rewarding PPO."""
    proxies = {name: [] for name in PROXIES}
    adapters = dict(lora=LORA, optimizer=dict(learning_rate=3e-3, weight_decay=0.01))
    for seed in range(1, seeds + 1):
        names = {kind: f"{kind}_{size}_{noise}_{seed}" for kind in PROXIES.values()}
        data = (f"pairs_{noise}/pairs.jsonl", f"heldout_{noise}")
        stages[names["map"]] = reward_model(size, *data, **adapters)
        stages[names["ensemble"]] = reward_model(size, *data, members=MEMBERS, **adapters)
        for posterior, subject in (("laplace", "map"), ("both", "ensemble")):
            stages[names[posterior]] = stage(
                "laplace", subject=names[subject], evaluation=dict(data=f"{data[1]}/pairs.jsonl")
            )
        for name, kind in PROXIES.items():
            proxies[name].append(names[kind])
    ranked = dict(
        subject="lm_medium",
        data=f"heldout_{noise}/pairs.jsonl",
        proxies={name: ",".join(sources) for name, sources in proxies.items()},
        gold="gold",
        against="chosen",
        **ANSWER,
    )
    chosen = f"choice_{size}_{noise}"
    stages[chosen] = stage("overoptimization", records=8 if small else 32, pool=128, batch_size=128, **ranked)
    policies = {}
    for name, (kind, adjustment) in POLICIES.items() if size == "medium" else ():
        runs = [f"{kind}_{adjustment}_{size}_{noise}_ppo_{seed}" for seed in range(1, seeds + 1)]
        for seed, run in enumerate(runs, 1):
            stages[run] = policy(
                f"{kind}_{size}_{noise}_{seed}", f"pairs_{noise}", adjustment, chosen, iterations=20 if small else 200
            )
        policies[name] = ",".join(runs)
    pools = dict(records=16 if small else 64, pool=128 if small else 512, batch_size=128)
    stages[f"best_{size}_{noise}"] = stage("overoptimization", policies=policies, **pools, **ranked)
    if (size, noise) == ("medium", "noisy") and not small:
        for name, changed in (("absolute", {"against": ""}), ("true", {"gold": TRUE})):
            stages[f"{name}_{size}_{noise}"] = stage("overoptimization", **pools, **{**ranked, **changed})


def policy(source, data, adjustment, chosen, iterations):
    """PPO against one proxy, without a KL penalty to speak of; gold looks on."""
    fields = {} if adjustment == "none" else dict(kind=adjustment, against="chosen")
    if adjustment in ("std", "variance"):
        fields["chosen_by"] = chosen
    return stage(
        "ppo",
        init="lm_medium",
        data=f"{data}/pairs.jsonl",
        reward=f"{source},gold",
        reward_weights=(1.0, 0.0),
        reward_adjustment=fields,
        iterations=iterations,
        batch_size=128,
        epochs=1,
        minibatches=2,
        kl_coef=0.005,
        kl_limit=100.0,
        critic="policy",
        value_clip=5.0,
        optimizer=dict(learning_rate=5e-4),
        checkpoint=dict(every=100),
        **ANSWER,
    )


# --- real pairs ------------------------------------------------------------------------------------------------------


def real_pairs(folder):
    """Calibration on pairs that people labelled: trained on helpful dialogues, held out there and on harmless ones."""
    config = experiment(seed=0)
    stages, pairs = config.stages, {}
    for name in ("helpful", "harmless"):
        data = str(folder / "hh-rlhf" / f"{name}-base.jsonl.gz")
        stages[name] = stage("split", data=data, schema="preference", test=0.3, on_error="skip")
        pairs[name] = {part: f"{name}/{part}.jsonl" for part in ("train", "test")}
    answers = ",".join(f"{name}/train_answers.jsonl" for name in pairs)
    stages.tokenizer = stage("tokenizer", data=answers, schema="completion", vocab_size=2000)
    stages.lm = stage(
        "sft",
        init="scratch",
        tokenizer="tokenizer/tokenizer.model",
        model=dict(layers=2, width=96, heads=4, kv_heads=2, head_dim=24, ffn=256, context=256),
        data=answers,
        on_error="skip",
        sequence_length=256,
        batch_size=16,
        loss_on="all",
        epochs=3.0,
        optimizer=dict(learning_rate=2e-3),
    )
    models = dict(
        init="lm",
        data=pairs["helpful"]["train"],
        schema="preference",
        on_error="skip",
        sequence_length=256,
        batch_size=32,
        epochs=4.0,
        lora=LORA,
        optimizer=dict(learning_rate=3e-3, weight_decay=0.01),
        evaluation=dict(data=pairs["helpful"]["test"], every=50, records=512),
    )
    held_out = dict(data=pairs["helpful"]["test"], shifted=pairs["harmless"]["test"], records=512)
    for seed in (1, 2, 3):
        stages[f"map_{seed}"] = stage("reward", **models)
        stages[f"ensemble_{seed}"] = stage("reward", members=MEMBERS, **models)
        for kind, subject in (("laplace", "map"), ("both", "ensemble")):
            stages[f"{kind}_{seed}"] = stage(
                "laplace", subject=f"{subject}_{seed}", temper=True, batch_size=8, evaluation=held_out
            )
    return config


# --- the paper's sizes -----------------------------------------------------------------------------------------------


def paper_size(policy, proxy, gold, data):
    """Yang et al. on Coste et al.'s set-up: a 1.4B policy, 70M (or 1.4B) proxies, a 7B gold model, 12,500 answers."""
    config = experiment(seed=0)
    stages = config.stages
    lora = dict(rank=8, alpha=16.0, targets=("q", "v"))
    compute = dict(dtype="bfloat16", param_dtype="bfloat16", remat="full")
    stages.policy = stage(
        "sft",
        init=policy,
        data=f"{data}/sft.jsonl",
        sequence_length=776,
        batch_size=4,
        epochs=3.0,
        compute=compute,
        optimizer=dict(learning_rate=8e-6),
    )
    answer = dict(max_new_tokens=256, top_p=0.9, missing_end="add", missing_end_penalty=0.0)
    for part in ("train", "heldout"):
        stages[f"pairs_{part}"] = stage(
            "annotate",
            subject="policy",
            data=f"{data}/{part}_prompts.jsonl",
            reward=gold,
            flips=0.25,
            batch_size=256,
            **answer,
        )
    models = dict(
        init=proxy,
        policy="policy",
        data="pairs_train/pairs.jsonl",
        schema="preference",
        max_new_tokens=256,
        sequence_length=776,
        batch_size=32,
        epochs=5.0,
        lora=lora,
        compute=compute,
        optimizer=dict(learning_rate=1e-4),
        evaluation=dict(data="pairs_heldout/pairs.jsonl"),
    )
    sources = {kind: [] for kind in PROXIES.values()}
    for seed in (1, 2, 3):
        stages[f"map_{seed}"] = stage("reward", **models)
        stages[f"ensemble_{seed}"] = stage("reward", members=MEMBERS, **models)
        for kind, subject in (("laplace", "map"), ("both", "ensemble")):
            held_out = dict(data="pairs_heldout/pairs.jsonl")
            stages[f"{kind}_{seed}"] = stage("laplace", subject=f"{subject}_{seed}", rank=100, evaluation=held_out)
        for kind in sources:
            sources[kind].append(f"{kind}_{seed}")
    stages.best = stage(
        "overoptimization",
        subject="policy",
        data=f"{data}/heldout_prompts.jsonl",
        proxies={name: ",".join(sources[kind]) for name, kind in PROXIES.items()},
        gold=gold,
        records=1000,
        pool=12_500,
        batch_size=500,
        **answer,
    )
    return config
