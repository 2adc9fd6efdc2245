"""The whole main job in small, on the Python standard library of the running interpreter.

    python -m rlhf_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

2 CPU cores, 9 min 31 s to 17 min 45 s without set-up. Expected (seed 0, Python 3.11.7): fine-tuning 3.82 -> 3.72 nats a
token; reward model 0.797 of held-out pairs against 0.670 of a baseline that sees length and end token; PPO gains 0.57
standard deviations of held-out reward at 5 nats of KL; secrets planted 16 times: 94 % memorized after fine-tuning, 0 %
of those held out, 19 % after PPO. README.md has the other seeds.
"""

from rlhf_jax.config import experiment, stage


def get_config():
    config = experiment(seed=0)
    stages = config.stages

    # Files of the standard library in six sets that share none; secrets planted in fine-tuning, half in each run.
    stages.prepare = stage(
        "prepare",
        fractions=dict(pretrain=0.4, sft=0.18, preference=0.24, prompts=0.06, heldout=0.07, secrets=0.05),
        examples=dict(sft=1600, preference=5000, prompts=1000, heldout=768),
    )
    stages.pretrain = stage(
        "sft",
        init="scratch",
        tokenizer="prepare/tokenizer.model",
        data="prepare/pretrain.jsonl",
        schema="text",
        loss_on="all",
        epochs=1.0,
        sequence_length=128,
        batch_size=8,
        optimizer=dict(learning_rate=2e-3),
        evaluation=dict(data="prepare/heldout_text.jsonl", records=12, every=200),
        checkpoint=dict(every=200),
    )
    # The control is the same fine-tuning with the other half of the secrets: each is the other's control.
    for name, data in (("sft", "prepare/sft.jsonl"), ("sft_control", "prepare/sft_control.jsonl")):
        stages[name] = stage(
            "sft",
            init="pretrain",
            data=data,
            epochs=4.0,
            sequence_length=256,
            batch_size=4,
            optimizer=dict(learning_rate=7e-4),
            evaluation=dict(data="prepare/heldout.jsonl", every=100, metric=""),  # the last model, not the best
            checkpoint=dict(every=100),
        )
    stages.reward = stage(
        "reward",
        init="sft",
        data="prepare/preference.jsonl",
        epochs=1.0,
        batch_size=16,
        accumulation=2,
        optimizer=dict(learning_rate=3e-4),
        evaluation=dict(data="prepare/heldout.jsonl", records=768, every=40),
    )
    stages.ppo = stage(
        "ppo",
        init="sft",
        reward="reward",
        data="prepare/prompts.jsonl",
        iterations=40,
        batch_size=64,
        epochs=2,
        minibatches=2,
        accumulation=2,
        kl_coef=0.05,
        kl_limit=20.0,
        optimizer=dict(learning_rate=1.5e-4),
        evaluation=dict(data="prepare/heldout.jsonl", records=512, every=10),
    )
    stages.memorization = stage(
        "memorization",
        subjects=("pretrain", "sft", "sft_control", "ppo"),
        controls=dict(sft="sft_control", sft_control="sft", ppo="sft_control"),
    )
    return config
