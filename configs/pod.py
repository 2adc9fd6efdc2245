"""Jobs of the sizes that pods are for: what they need of which slice, and the configs to run them with.

    python -m rlhf_jax.main --config=configs/pod.py:llama-3.1-8b,ppo_lora,16 --workdir=/tmp/plan --topology=v5e:4x4

compiles the job's programs for that slice, here, and says whether they fit. The argument is MODEL,JOB,FSDP[,TENSOR];
models are the folders of `configs/pod`, which hold a config.json and no weights. To run one, give the folder of a real
checkpoint in place of MODEL and data on the command line (--config.stages.sft.data=...), on a slice of that many chips.

Jobs: "sft" (every weight, 2,048 tokens a row), "private_sft" (adapters of rank 16, epsilon 8), "ppo_lora" (policy,
value, reference and reward model on one base), "ppo_full" (every weight of policy and value), "safe_rlhf" (with a cost
model and its critic: six roles). Weights and products are bfloat16, the optimizer keeps a float32 copy of what trains.
"""

from pathlib import Path

from rlhf_jax.config import experiment, stage

MODELS = Path(__file__).with_name("pod")
JOBS = ("sft", "private_sft", "ppo_lora", "ppo_full", "safe_rlhf")
COMPUTE = dict(dtype="bfloat16", param_dtype="bfloat16", remat="full")
LORA = dict(rank=16, alpha=32.0)
PROMPT, ANSWER = 512, 512  # tokens


def get_config(argument="llama-3.1-8b,sft,16"):
    model, job, fsdp, *tensor = argument.split(",")
    if job not in JOBS:
        raise ValueError(f'"{job}" is no job: {", ".join(JOBS)}')
    folder = str(MODELS / model) if (MODELS / model).is_dir() else model
    mesh = dict(fsdp=int(fsdp), tensor=int(tensor[0]) if tensor else 1)
    rows = mesh["fsdp"] * mesh["tensor"]
    config = experiment(seed=0)
    stages, common = config.stages, dict(compute=COMPUTE, mesh=mesh)
    if job in ("sft", "private_sft"):
        stages[job] = stage(
            "sft", init=folder, data="data/sft.jsonl", schema="messages", sequence_length=2048,
            batch_size=4 * rows, accumulation=4, optimizer=dict(learning_rate=1e-5), **common,
        )  # fmt: skip
        if job == "private_sft":
            stages[job].lora.update(LORA)
            stages[job].update(packing=False, batch_size=16 * rows, accumulation=16)
            stages[job].privacy.update(epsilon=8.0, delta=1e-6)
        return config
    lora = dict(rank=0) if job == "ppo_full" else LORA
    scorer = dict(init=folder, data="data/pairs.jsonl", sequence_length=1024, batch_size=rows, lora=lora, **common)
    stages.reward = stage("reward", schema="preference", **scorer)
    policy = dict(
        init=folder, reward="reward", data="data/prompts.jsonl", prompt_buckets=(PROMPT,), max_new_tokens=ANSWER,
        batch_size=8 * rows, minibatches=2, accumulation=2, epochs=1, lora=lora, **common,
    )  # fmt: skip
    if job == "safe_rlhf":
        stages.cost = stage("cost", **scorer)
        policy["constraint"] = dict(cost="cost")
    stages.ppo = stage("ppo", **policy)
    return config
