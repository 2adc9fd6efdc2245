"""Stages on Hugging Face folders: from a checkpoint through every trainable stage to an exported one."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import files, result, run_main

from rlhf_jax.config import experiment, stage
from rlhf_jax.data.records import write_records
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.pretrained import load_pretrained, save_pretrained
from rlhf_jax.models.roles import hidden_states, init_base, merged_base
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.pipeline import plan
from rlhf_jax.training.artifacts import load_checkpoint, load_role

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
SHAPE = dict(layers=2, width=24, heads=4, kv_heads=2, head_dim=8, ffn=40, context=160)
WORDS = ("red", "blue", "old", "new", "big", "small")


def checkpoint(folder, tokenizer_folder, family, key, reward=False, **changes):
    """A random checkpoint folder of a family with a real tokenizer's files."""
    tokenizer = load_tokenizer(FIXTURES / tokenizer_folder)
    config = TransformerConfig(vocab_size=tokenizer.vocab_size + 3, family=family, **SHAPE | changes)
    params = init_base(config, key=jax.random.key(key))
    head = init_head(config.width, 1.0, key=jax.random.key(key + 1)) if reward else None
    save_pretrained(folder, config, params, tokenizer, head=head)
    return folder


def user(word):
    return [{"role": "user", "content": f"Is it {word}?"}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model, a reward model of another family with another tokenizer, and conversations."""
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoint(root / "policy", "qwen", "qwen2", 0, qkv_bias=True)
    checkpoint(root / "judge", "llama3", "llama", 5, reward=True)
    rows = [word for word in WORDS for _ in range(3)]
    write_records(root / "chat.jsonl", [{"messages": user(w) + assistant(f"It is {w}.")} for w in rows])
    pairs = [{"prompt": user(w), "chosen": assistant("Yes."), "rejected": assistant("No, no.")} for w in rows]
    write_records(root / "pairs.jsonl", pairs)
    write_records(root / "prompts.jsonl", [{"prompt": user(w)} for w in rows])
    return root


def job(root, **stages):
    config = experiment(seed=0)
    config.logging.update(every=1, tensorboard=False)
    for name, fields in stages.items():
        config.stages[name] = stage(**fields)
    return config


def small(**fields):
    return dict(batch_size=8, checkpoint=dict(every=2), evaluation=dict(every=2)) | fields


def chat_stages(root):
    lora = dict(rank=2, targets=("q", "v"))
    return dict(
        sft=small(
            kind="sft",
            init=str(root / "policy"),
            data=str(root / "chat.jsonl"),
            schema="messages",
            sequence_length=96,
            compute=dict(dtype="bfloat16", remat="dots"),
            optimizer=dict(name="adafactor"),
            evaluation=dict(data=str(root / "chat.jsonl"), every=2, samples=2),
        ),
        reward=small(
            kind="reward",
            init="sft",
            data=f"{root / 'pairs.jsonl'}:0.5,{root / 'pairs.jsonl'}:0.5",
            schema="preference",
            max_new_tokens=6,
            calibration_prompts=8,
            rollout_batch_size=8,
            prompt_buckets=(24,),
            sequence_length=128,
            lora=lora,
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
            prompt_buckets=(30,),
            stop_strings=("a", "e"),
            lora=lora,
        ),
        merged=dict(kind="export", subject="ppo", dtype="float32"),
        apart=dict(kind="export", subject="ppo", merge=False),
        judge=dict(kind="export", subject="reward"),
    )


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """The work directory of a run through all of it, by the real command."""
    root = tmp_path_factory.mktemp("chat")
    (root / "config.py").write_text(
        "from rlhf_jax.config import experiment, stage\n"
        "def get_config():\n"
        "    config = experiment(seed=0)\n"
        "    config.logging.update(every=1, tensorboard=False)\n"
        f"    for name, fields in {chat_stages(folders)!r}.items():\n"
        "        config.stages[name] = stage(**fields)\n"
        "    return config\n"
    )
    done = run_main(root / "config.py", root / "work")
    assert done.status == 0, done
    return root / "work"


def logits(config, params, tokens):
    return np.asarray(jax.jit(lambda p, t: Transformer(config).apply({"params": p}, t))(params, tokens))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 12)), jnp.int32)


def test_every_stage_runs_on_a_checkpoint_in_bfloat16(finished, folders):
    sft = json.loads((finished / "sft" / "model.json").read_text())
    assert sft["model"]["family"] == "qwen2" and sft["model"]["dtype"] == "bfloat16"
    assert result(finished, "sft")["figures"]["loss/eval"] < result(finished, "sft")["figures"]["loss/eval_start"]
    assert result(finished, "reward")["figures"]["pairs"] == 36
    ppo = result(finished, "ppo")["figures"]
    assert ppo["scored_in_one_pass"] and ppo["memory"]["reference"]["base_of"] == "policy"
    assert ppo["memory"]["reward"]["base_of"] == "reward"


def test_an_exported_folder_computes_what_the_stage_did(finished):
    mesh = make_mesh(devices=jax.devices()[:1])
    role = load_role(finished, "ppo", mesh, {})
    config, params = load_pretrained(finished / "merged" / "checkpoint")
    base = merged_base(role.spec, role.weights)
    for ours, theirs in zip(jax.tree.leaves(base), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tokenizer = load_tokenizer(finished / "merged" / "checkpoint")
    assert tokenizer.encode("red, blue") == role.tokenizer.encode("red, blue")
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (role.tokenizer.eos_id, role.tokenizer.stop_ids)


def test_adapters_exported_apart_stand_on_their_base(finished):
    mesh = make_mesh(devices=jax.devices()[:1])
    role, back = load_role(finished, "ppo", mesh, {}), load_checkpoint(finished / "apart" / "checkpoint", mesh, {})
    assert back.spec.lora is not None and set(back.weights["adapters"]) == {"q", "v"}
    config, merged = load_pretrained(finished / "merged" / "checkpoint")
    ours = logits(config, merged_base(back.spec, back.weights), TOKENS)
    np.testing.assert_allclose(ours, logits(config, merged, TOKENS), atol=1e-5)
    assert role.spec.lora.rank == back.spec.lora.rank


def test_an_exported_reward_model_scores_as_the_stage_did(finished):
    mesh = make_mesh(devices=jax.devices()[:1])
    role, back = load_role(finished, "reward", mesh, {}), load_checkpoint(finished / "judge" / "checkpoint", mesh, {})

    def scores(role):
        hidden = hidden_states(role.spec, role.weights, TOKENS).astype(jnp.float32)
        return hidden @ role.weights["head"]["kernel"] + role.weights["head"]["bias"]

    eps = float(jnp.finfo(jnp.bfloat16).eps)
    exported = scores(back)  # in float32: the stage computed in bfloat16
    np.testing.assert_allclose(scores(role), exported, atol=8 * eps * float(jnp.abs(exported).max()))


def test_a_moved_checkpoint_is_the_same_and_a_changed_one_is_refused(folders, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folders, moved)
    config = job(moved, sft=chat_stages(moved)["sft"] | dict(data=str(folders / "chat.jsonl")))
    config.stages.sft.evaluation.data = ""
    before = job(folders, sft=chat_stages(folders)["sft"])
    before.stages.sft.evaluation.data = ""
    from rlhf_jax.pipeline import identities

    assert identities(config, ["sft"]) == identities(before, ["sft"])
    shutil.rmtree(moved / "policy")
    checkpoint(moved / "policy", "qwen", "qwen2", 9, qkv_bias=True)
    assert identities(config, ["sft"]) != identities(before, ["sft"])


def test_a_dry_run_shows_model_memory_sharing_and_masked_examples(folders, tmp_path):
    text = plan(job(folders, **{k: v for k, v in chat_stages(folders).items() if k != "judge"}), tmp_path / "work")
    assert "qwen2 decoder" in text and "products in bfloat16" in text
    assert "policy+reference+value on sft" in text and f"reward on {folders / 'judge'}" in text
    assert text.count("example 3:") == 3
    assert "⟧It is red." in text.replace("\\n", "").replace("<think>", "") or "It is red." in text
    assert not (tmp_path / "work").exists()


# What is refused before anything runs, in one line.


def refusal(config, tmp_path):
    with pytest.raises(UserError) as caught:
        plan(config, tmp_path / "work")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copies(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "copy")
    return tmp_path / "copy"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_truncated_weight_file(copies, tmp_path):
    weights = copies / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(job(copies, sft=chat_stages(copies)["sft"]), tmp_path)


def test_an_unknown_architecture(copies, tmp_path):
    edit_json(copies / "policy" / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    said = refusal(job(copies, sft=chat_stages(copies)["sft"]), tmp_path)
    assert "mamba" in said.lower() and "llama" in said


def test_a_mixture_of_experts(copies, tmp_path):
    edit_json(copies / "policy" / "config.json", model_type="mixtral", architectures=["MixtralForCausalLM"])
    assert "xpert" in refusal(job(copies, sft=chat_stages(copies)["sft"]), tmp_path)


def test_a_vocabulary_larger_than_the_embedding(copies, tmp_path):
    edit_json(copies / "policy" / "config.json", vocab_size=7)
    assert "7" in refusal(job(copies, sft=chat_stages(copies)["sft"]), tmp_path)


def test_a_language_model_as_reward_model(folders, tmp_path):
    stages = chat_stages(folders)
    stages["ppo"] |= dict(init=str(folders / "policy"), reward=str(folders / "policy"))
    said = refusal(job(folders, ppo=stages["ppo"]), tmp_path)
    assert "stages.ppo.reward" in said and "sequence-classification" in said


def test_a_stop_string_that_no_token_sequence_ends(folders, tmp_path):
    stages = chat_stages(folders)
    stages["ppo"] |= dict(init=str(folders / "policy"), stop_strings=("",))
    assert "stop" in refusal(job(folders, ppo=stages["ppo"]), tmp_path)
    after = dict(sft=stages["sft"], ppo=stages["ppo"] | dict(init="sft"))  # the tokenizer is known before sft has run
    assert "stop" in refusal(job(folders, **after), tmp_path)


def test_an_adapter_for_another_base(finished, copies, tmp_path):
    shutil.copytree(finished / "apart" / "checkpoint", copies / "adapter")
    edit_json(copies / "adapter" / "adapter_config.json", base_model_name_or_path=str(copies / "other"))
    checkpoint(copies / "other", "qwen", "qwen2", 3, qkv_bias=True, width=32)
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(UserError, match="(?s)^(?!.*\n).*24.*32|^(?!.*\n).*32.*24"):
        load_checkpoint(copies / "adapter", mesh, {})
    on_it = chat_stages(copies)["sft"] | dict(init=str(copies / "adapter"))
    assert "24" in refusal(job(copies, sft=on_it), tmp_path)
    edit_json(copies / "adapter" / "adapter_config.json", base_model_name_or_path="nobody/nothing")
    with pytest.raises(UserError, match="base_model_name_or_path"):
        load_checkpoint(copies / "adapter", mesh, {})


def test_no_checkpoint_folder_there(folders, tmp_path):
    stages = chat_stages(folders)
    stages["sft"]["init"] = str(folders / "nothing")
    assert "no checkpoint folder" in refusal(job(folders, sft=stages["sft"]), tmp_path)


def test_nothing_of_the_work_directory_changes_on_a_second_run(finished):
    before = files(finished / "merged" / "checkpoint")
    done = run_main(finished.parent / "config.py", finished)
    assert done.status == 0 and files(finished / "merged" / "checkpoint") == before
