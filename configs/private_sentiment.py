"""Private alignment in small, after Wu et al. (2023, arXiv 2310.16960): positive reviews at every epsilon.

    python -m rlhf_jax.main --config=configs/private_sentiment.py:FOLDER --workdir=runs/private_sentiment

FOLDER holds the Large Movie Review Dataset as train.jsonl.gz and test.jsonl.gz, records {id, text, label}. What is
public and what is private is declared before anything runs:

  public: test, without the texts that occur in train too: the tokenizer, the base decoder (0.3 million parameters), the
    classifier that is the reward, and the reviews whose beginnings are the held-out prompts.
  private: train, cut into two halves by a hash of the text: D1 for fine-tuning, D3 for PPO, without what is in D1.

For each epsilon (1, 2, 4, 8, and the same steps without noise) and three seeds a decoder is fine-tuned on D1 and
aligned on D3 with adapters of rank 4 on queries and values. The halves are disjoint, so what is spent is the larger one
of the two, not their sum (`privacy.json` tells more of all stages together, as each seed and each epsilon reads the
same reviews again). At epsilon 4 a control is rewarded 0 for everything; stages judged_... score it by the classifier.

Settings were tuned at epsilon 4 with seed 1, in six runs of the same size (minibatches of 256 to 1024, learning rate
0.003 to 0.03, clip norm 0.1 to 2, KL coefficient 0.05 and 0.02); each spent as much again on the same reviews, which no
claim of the sweep counts.

The paper's size, by the same fields with a GPT-2 folder as `init` of the sft_ stages, a public classifier's folder as
`reward`, and halves of 12,500 whole reviews: fine-tuning batch 512, 40 epochs, rate 3e-4 constant, weight decay 0.01,
clip norm 1; PPO minibatches of 256, 4096 answers an iteration, one epoch, 100 passes over D3 (iterations=305), rates
3e-3, 1e-3 and 2e-5 from GPT-2 small to large, adapters of rank 4 on queries and values, delta 4e-5 for both halves
together.

The trend test, declared before the first run: Jonckheere and Terpstra's over the 12 held-out scores at epsilon 1, 2, 4
and 8, one-sided for scores that rise with epsilon, exact, at 5 %. report.html shows it with the plot.
"""

import gzip
import hashlib
import json
from pathlib import Path

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.units import normalized_prompt, shared_units

EPSILONS, SEEDS = (1.0, 2.0, 4.0, 8.0, float("inf")), (1, 2, 3)
CONTROL = 4.0  # the epsilon whose seeds have a control without reward
DELTA = 8e-6  # a tenth of 1 / 12,500
LORA = dict(rank=4, targets=("q", "v"), alpha=8.0)
HELD_OUT = 1024  # public reviews that nothing is trained on


def zero(prompts, answers, records):
    """The control's reward."""
    return [0.0] * len(answers)


def split(folder, out):
    """Writes d1, d3, public and held_out.jsonl, by hashes of the texts alone; returns the folder they are in."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "d3.jsonl").exists():
        return out

    def read(part):
        with gzip.open(Path(folder) / f"{part}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return sorted(rows, key=lambda row: (hashlib.sha256(normalized_prompt(row).encode()).hexdigest(), row["id"]))

    def without(rows, others):
        """The rows whose text is not among the others', as the ledger compares texts."""
        named = [(row["id"], normalized_prompt(row)) for row in rows]
        shared = shared_units(named, [("", normalized_prompt(row)) for row in others], by_name=False)
        return [row for row in rows if row["id"] not in shared]

    train, test = read("train"), read("test")
    test, d1 = without(test, train), train[: len(train) // 2]
    d3 = without(train[len(train) // 2 :], d1)
    for name, rows in {"d1": d1, "public": test[:-HELD_OUT], "held_out": test[-HELD_OUT:], "d3": d3}.items():
        partial = out / f"{name}.jsonl.tmp"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(out / f"{name}.jsonl")
    return out


def get_config(argument="imdb"):
    folder, _, out = argument.partition(",")
    files = split(folder, Path(out or "runs/private_sentiment_data"))
    d1, d3, public, held_out = (str(files / f"{name}.jsonl") for name in ("d1", "d3", "public", "held_out"))
    config = experiment(seed=0)
    config.privacy.update(public=(public, held_out), overlap="compose")
    stages = config.stages
    stages.tokenizer = stage("tokenizer", data=public, vocab_size=2048)
    stages.base = stage(
        "sft",
        init="scratch",
        tokenizer="tokenizer/tokenizer.model",
        model=dict(layers=3, width=64, heads=4, kv_heads=2, head_dim=16, ffn=192, context=64),
        data=public,
        schema="text",
        loss_on="all",
        sequence_length=64,
        batch_size=32,
        epochs=0.5,
        optimizer=dict(learning_rate=3e-3),
        checkpoint=dict(every=500),
        evaluation=dict(data=held_out, records=64, every=500),
    )
    stages.classifier = stage(
        "reward",
        init="base",
        data=public,
        schema="label",
        sequence_length=48,
        batch_size=64,
        epochs=2.0,
        optimizer=dict(learning_rate=1e-3),
        evaluation=dict(data=held_out, records=512, every=100),
    )
    for epsilon in EPSILONS:
        for seed in SEEDS:
            privacy = dict(epsilon=epsilon, delta=DELTA)
            name = f"{'inf' if epsilon == float('inf') else round(epsilon)}_seed_{seed}"
            stages[f"sft_{name}"] = stage(
                "sft",
                init="base",
                data=d1,
                schema="text",
                loss_on="all",
                packing=False,
                sequence_length=48,
                batch_size=256,
                accumulation=2,
                epochs=2.0,
                lora=LORA,
                optimizer=dict(learning_rate=3e-3, schedule="constant", weight_decay=0.01, clip_norm=0.0, b2=0.999),
                privacy=privacy,
                checkpoint=dict(every=50),
                evaluation=dict(data=held_out, records=64, every=100, metric="", samples=2),
            )
            for reward in ("classifier", f"{Path(__file__).absolute()}:zero")[: 2 if epsilon == CONTROL else 1]:
                stages[f"{'ppo' if reward == 'classifier' else 'zero'}_{name}"] = stage(
                    "ppo",
                    init=f"sft_{name}",
                    reward=reward,
                    data=d3,
                    schema="text",
                    prefix_tokens=(8, 16),
                    max_new_tokens=24,
                    missing_end="add",
                    missing_end_penalty=0.0,
                    iterations=40,
                    batch_size=1024,
                    minibatches=2,
                    accumulation=4,
                    epochs=1,
                    estimator="gae",
                    critic="shared",
                    whiten_advantages=False,
                    kl_coef=0.02,
                    lora=LORA,
                    optimizer=dict(learning_rate=6e-3, clip_norm=0.0, b2=0.999),
                    privacy=dict(clip_norm=2.0, **privacy),
                    checkpoint=dict(every=20),
                    evaluation=dict(data=held_out, records=HELD_OUT, every=40, metric="", samples=2),
                )
            if epsilon == CONTROL:
                stages[f"judged_{name}"] = stage(
                    "best_of_n",
                    subject=f"zero_{name}",
                    reward="classifier",
                    data=held_out,
                    schema="text",
                    prefix_tokens=(8, 16),
                    max_new_tokens=24,
                    missing_end="add",
                    missing_end_penalty=0.0,
                    samples=2,
                    batch_size=256,
                )
    return config
