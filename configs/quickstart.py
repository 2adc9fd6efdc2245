"""The whole main job in small, on the Python standard library of the running interpreter."""

from rlhf_jax.config import experiment, stage


def get_config():
    config = experiment(seed=0)
    stages = config.stages
    stages.prepare = stage(
        "prepare",
        fractions=dict(pretrain=0.4, sft=0.18, preference=0.24, prompts=0.06, heldout=0.07, secrets=0.05),
        examples=dict(sft=1600, preference=3000, prompts=1000, heldout=768),
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
        batch_size=32,
        accumulation=4,
        optimizer=dict(learning_rate=4e-3),
        evaluation=dict(data="prepare/heldout_text.jsonl", records=12, every=100),
    )
    for name, data in (("sft", "prepare/sft.jsonl"), ("sft_control", "prepare/sft_control.jsonl")):
        stages[name] = stage(
            "sft",
            init="pretrain",
            data=data,
            epochs=5.0,
            sequence_length=128,
            batch_size=32,
            accumulation=4,
            optimizer=dict(learning_rate=3e-3),
            evaluation=dict(data="prepare/heldout.jsonl", every=50, metric=""),
        )
    stages.reward = stage(
        "reward",
        init="sft",
        data="prepare/preference.jsonl",
        epochs=2.0,
        batch_size=32,
        accumulation=4,
        optimizer=dict(learning_rate=5e-4),
        evaluation=dict(data="prepare/heldout.jsonl", records=768, every=20),
    )
    stages.ppo = stage(
        "ppo",
        init="sft",
        reward="reward",
        data="prepare/prompts.jsonl",
        iterations=40,
        accumulation=2,
        optimizer=dict(learning_rate=3e-4),
        evaluation=dict(data="prepare/heldout.jsonl", records=256),
    )
    stages.memorization = stage(
        "memorization",
        subjects=("pretrain", "sft", "sft_control", "ppo"),
        controls=dict(sft="sft_control", sft_control="sft", ppo="sft_control"),
    )
    return config
