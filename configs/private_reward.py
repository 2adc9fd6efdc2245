"""Three private stages in a row, after Wu et al. (2023, arXiv 2310.16960, section 5): fine-tuning, reward model, PPO.

    python -m rlhf_jax.main --config=configs/private_reward.py:MODEL,PAIRS --workdir=runs/private_reward

MODEL is a public checkpoint folder (the 260-thousand-parameter TinyStories model), PAIRS the folder of the HH-RLHF
pairs: harmless-base, helpful-base, helpful-online and helpful-rejection-sampled.jsonl.gz, records {chosen, rejected} of
whole dialogues. These are the published test splits; here their records are cut anew, by a hash of the prompt, so that
all pairs of one prompt are in one part: 30 % D1 (fine-tuning on the chosen answers), 40 % D2 (pairs), 20 % D3
(prompts), and 10 % declared public, to judge by. Pairs whose answers are equal are dropped.

The unit is the prompt: all pairs of one dialogue are one unit, of which one is read. The three parts are
disjoint, so all three stages together claim what the dearest one spends (`privacy.json`).

The paper's size, by the same fields with a GPT-2 folder in MODEL's place and Reddit TL;DR in PAIRS': fine-tuning batch
512, 10 epochs, rate 3e-4; reward model batch 4096, 50 epochs, rate 2e-4; PPO minibatches of 256, 4096 answers an
iteration, one epoch, rates 3e-3, 1e-3 and 2e-5 from small to large; adapters of rank 4 on queries and values, clip norm
1, AdamW, delta one over the records. Here delta is a tenth of one over the units.
"""

import gzip
import hashlib
import json
from pathlib import Path

from rlhf_jax.config import experiment, stage

FILES = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
PARTS = {"d1": 0.3, "d2": 0.7, "d3": 0.9, "public": 1.0}  # ends of the ranges of the hash
EPSILON, DELTA = 8.0, 5e-5
LORA = dict(rank=4, targets=("q", "v"), alpha=8.0)
MARK = "\n\nAssistant:"
LONGEST = 400  # characters of a prompt, so that prompt and answer fit the model


def split(pairs, out):
    """Writes d1, d2, d3 and public.jsonl, each with its prompt and unit; returns the folder they are in."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "public.jsonl").exists():
        return out
    rows = {name: [] for name in PARTS}
    for name in FILES:
        with gzip.open(Path(pairs) / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in file:
                pair = json.loads(line)
                at = pair["chosen"].rindex(MARK) + len(MARK)
                prompt = pair["chosen"][:at]
                chosen, rejected = pair["chosen"][at:], pair["rejected"][pair["rejected"].rindex(MARK) + len(MARK) :]
                if chosen == rejected or not pair["rejected"].startswith(prompt) or len(prompt) > LONGEST:
                    continue
                unit = hashlib.sha256(prompt.encode()).hexdigest()[:16]
                part = next(name for name, end in PARTS.items() if int(unit, 16) < end * 16**16)
                rows[part].append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "dialogue": unit})
    for part, found in rows.items():
        if part == "d1":
            found = [{"prompt": r["prompt"], "completion": r["chosen"], "dialogue": r["dialogue"]} for r in found]
        partial = out / f"{part}.jsonl.tmp"
        partial.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        partial.replace(out / f"{part}.jsonl")
    return out


def get_config(argument="stories260k,hh-rlhf"):
    model, pairs, *out = argument.split(",")
    files = split(pairs, Path(out[0] if out else "runs/private_reward_data"))
    d1, d2, d3, public = (str(files / f"{name}.jsonl") for name in PARTS)
    config = experiment(seed=0)
    config.privacy.update(public=(public,))
    stages = config.stages
    privacy = dict(epsilon=EPSILON, delta=DELTA, unit="dialogue")
    rate = dict(schedule="constant", weight_decay=0.01, clip_norm=0.0, b2=0.999)
    stages.sft = stage(
        "sft",
        init=model,
        data=d1,
        on_error="skip",
        packing=False,
        sequence_length=384,
        batch_size=128,
        accumulation=8,
        epochs=3.0,
        lora=LORA,
        optimizer=dict(learning_rate=3e-3, **rate),
        privacy=privacy,
        checkpoint=dict(every=20),
        evaluation=dict(data="", metric=""),
    )
    stages.reward = stage(
        "reward",
        init="sft",
        data=d2,
        schema="preference",
        on_error="skip",
        sequence_length=384,
        max_new_tokens=32,
        batch_size=128,
        accumulation=8,
        epochs=3.0,
        rollout_batch_size=64,
        lora=LORA,
        optimizer=dict(learning_rate=3e-3, **rate),
        privacy=privacy,
        checkpoint=dict(every=20),
        evaluation=dict(data=public, records=512, every=20, metric=""),
    )
    stages.ppo = stage(
        "ppo",
        init="sft",
        reward="reward",
        data=d3,
        iterations=10,
        batch_size=512,
        minibatches=4,
        accumulation=4,
        epochs=1,
        max_new_tokens=32,
        missing_end="add",
        missing_end_penalty=0.0,
        critic="shared",
        whiten_advantages=False,
        lora=LORA,
        optimizer=dict(learning_rate=3e-3, clip_norm=0.0, b2=0.999),
        privacy=privacy,
        checkpoint=dict(every=5),
        evaluation=dict(data=public, records=256, every=5, metric=""),
    )
    return config
