"""Stages over a base in 8 bits: adapters trained by sft, and by ppo on the same base, from a checkpoint folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoints import WORDS, assistant, checkpoint, logits, small, user
from tiny import files, metrics, model_info, result, run_main

from rlhf_jax.data.records import write_records
from rlhf_jax.distributed import make_mesh
from rlhf_jax.models.leaves import base_leaves, count, layer_leaves
from rlhf_jax.models.pretrained import load_pretrained
from rlhf_jax.models.roles import merged_base
from rlhf_jax.training.artifacts import load_role

LORA = dict(rank=2, targets=("q", "v", "down"))


def stages(root):
    return dict(
        sft=small(
            kind="sft",
            init=str(root / "policy"),
            data=str(root / "chat.jsonl"),
            schema="messages",
            sequence_length=96,
            compute=dict(base="int8"),
            lora=LORA,
            optimizer=dict(learning_rate=1e-2),
            evaluation=dict(data=str(root / "chat.jsonl"), every=2, samples=2),
        ),
        ppo=small(
            kind="ppo",
            init="sft",
            reward=str(root / "judge"),
            data=str(root / "prompts.jsonl"),
            iterations=2,
            minibatches=1,
            epochs=1,
            max_new_tokens=8,
            compute=dict(base="int8"),
            lora=LORA,
        ),
        merged=dict(kind="export", subject="ppo"),
        apart=dict(kind="export", subject="ppo", merge=False),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of a run through all of it, by the real command."""
    root = tmp_path_factory.mktemp("quantized")
    checkpoint(root / "policy", "qwen", "qwen2", 0, qkv_bias=True)
    checkpoint(root / "judge", "llama3", "llama", 5, reward=True)
    rows = [word for word in WORDS for _ in range(3)]
    write_records(root / "chat.jsonl", [{"messages": user(w) + assistant(f"It is {w}.")} for w in rows])
    write_records(root / "prompts.jsonl", [{"prompt": user(w)} for w in rows])
    (root / "config.py").write_text(
        "from rlhf_jax.config import experiment, stage\n"
        "def get_config():\n"
        "    config = experiment(seed=0)\n"
        "    config.logging.update(every=1, tensorboard=False)\n"
        f"    for name, fields in {stages(root)!r}.items():\n"
        "        config.stages[name] = stage(**fields)\n"
        "    return config\n"
    )
    done = run_main(root / "config.py", root / "work")
    assert done.status == 0, done
    return root / "work"


def test_the_loss_falls_and_the_base_takes_a_byte_a_weight(finished):
    figures = result(finished, "sft")["figures"]
    assert figures["loss/eval"] < figures["loss/eval_start"]
    role = load_role(finished, "sft", make_mesh(devices=jax.devices()[:1]), {})
    config = role.spec.config
    matrices = [leaf for leaf in layer_leaves(config).values() if len(leaf.shape) == 2]
    weights, channels = (config.layers * sum(f(x) for x in matrices) for f in (lambda x: count({"": x}), _channels))
    others = count(base_leaves(config)) - weights
    assert figures["memory"]["sft"]["base"] == weights + 4 * channels + 4 * others


def _channels(leaf):
    return leaf.shape[1]


def test_the_roles_of_ppo_share_one_base_that_no_stage_stores(finished):
    figures = result(finished, "ppo")["figures"]
    assert figures["scored_in_one_pass"]
    assert {figures["memory"][role]["base_of"] for role in ("policy", "reference", "value")} == {"policy"}
    sft, ppo = model_info(finished, "sft"), model_info(finished, "ppo")
    assert sft["parts"] == ppo["parts"] == ["adapters"]
    assert sft["base_kind"] == ppo["base_kind"] == "int8"
    assert sft["fingerprints"]["base"] == ppo["fingerprints"]["base"]
    assert ppo["base_checkpoint"] == str(finished.parent / "policy")


def test_the_policy_starts_as_its_reference(finished):
    """Decoding reads merged weights, scoring codes: the first update's ratio is 1 and its KL 0 within rounding."""
    first = metrics(finished, "ppo")[0]
    assert abs(first["objective/kl"]) < 1e-5 and abs(first["policy/approxkl"]) < 1e-8


def test_what_is_exported_is_what_was_trained(finished):
    role = load_role(finished, "ppo", make_mesh(devices=jax.devices()[:1]), {})
    config, params = load_pretrained(finished / "merged" / "checkpoint")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 12)), jnp.int32)
    ours = logits(config, merged_base(role.spec, role.weights), tokens)
    np.testing.assert_array_equal(ours, logits(config, params, tokens))
    assert "adapter_model.safetensors" in result(finished, "apart")["figures"]["files"]


def test_nothing_changes_on_a_second_run(finished):
    before = files(finished / "ppo" / "model")
    done = run_main(finished.parent / "config.py", finished)
    assert done.status == 0 and files(finished / "ppo" / "model") == before
