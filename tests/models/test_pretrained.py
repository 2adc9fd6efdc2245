"""Checkpoint folders: what is read is what was written, from any file, onto any mesh, and what is wrong is said."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rlhf_jax.distributed.sharding import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, Transformer, TransformerConfig
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.lora import init_adapters, merge, scaled
from rlhf_jax.models.pretrained import (
    answer_mark,
    checkpoint_identity,
    generation_settings,
    is_checkpoint,
    is_reward_model,
    load_pretrained,
    load_reward_model,
    read_config,
    save_pretrained,
)
from rlhf_jax.models.roles import init_base
from rlhf_jax.rollout import Sampling, generate

FIXTURES = Path(__file__).parent / "fixtures"
STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "stories260k"
REWARD = ["gpt2_reward", "llama_reward", "qwen2_reward"]


def copied(name, folder):
    shutil.copytree(FIXTURES / name, folder)
    return folder


def edited(folder, **changes):
    """Changes keys of config.json; None drops one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    return folder


def retensored(folder, change):
    """Rewrites model.safetensors with a changed dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def all_tensors(folder):
    return {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def llama():
    return load_pretrained(FIXTURES / "llama")


# Round trips


def test_a_sharded_checkpoint_loads_as_the_whole_one(llama, tmp_path):
    config, params = llama
    save_pretrained(tmp_path / "many", config, params, shard_bytes=4_000)
    save_pretrained(tmp_path / "one", config, params)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5  # a layer's tensors lie in several files
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(tmp_path / "one" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    for name in ("many", "one"):
        again, loaded = load_pretrained(tmp_path / name)
        assert again == config
        assert_same_tree(loaded, params)


MESHES = [
    ("llama", (2, 2, 2)),
    ("gpt_neox", (2, 2, 2)),
    ("gpt2", (1, 4, 2)),
    ("gemma2", (1, 2, 4)),
    ("gpt_neox", (1, 1, 8)),
]


@pytest.mark.parametrize("name, shape", MESHES)
def test_loading_onto_a_mesh_gives_the_same_parameters_sharded(name, shape, tmp_path):
    config, params = load_pretrained(FIXTURES / name)
    mesh = make_mesh(*shape)
    on_mesh, sharded = load_pretrained(FIXTURES / name, mesh=mesh)
    assert on_mesh == config
    assert_same_tree(sharded, params)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(sharded))
    layers, d_in, d_out = params["layers"]["q"].shape
    shard = sharded["layers"]["q"].addressable_shards[0].data.shape
    assert shard == (layers, d_in // shape[1], d_out // shape[2])
    save_pretrained(tmp_path / "out", config, sharded)
    assert_same_tree(load_pretrained(tmp_path / "out")[1], params)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_cast_from_what_is_stored_to_what_is_asked(stored, dtype, llama, tmp_path):
    folder = retensored(copied("llama", tmp_path / "in"), lambda t: {k: v.astype(stored) for k, v in t.items()})
    config, params = load_pretrained(folder, dtype=dtype)
    assert (config.dtype, config.param_dtype) == (dtype, dtype)
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf).astype(stored).astype(jnp.dtype(dtype)), llama[1])
    assert_same_tree(params, wanted)


def test_exports_are_cast(llama, tmp_path):
    config, params = llama
    save_pretrained(tmp_path / "out", config, params, dtype="bfloat16")
    tensors = all_tensors(tmp_path / "out")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_adapters_are_merged_in_float32(name, tmp_path):
    config, params = load_pretrained(FIXTURES / name, dtype="bfloat16")
    lora = LoraConfig(rank=2)
    shapes = jax.eval_shape(lambda key: init_adapters(config, lora, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = scaled(jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes), lora)
    save_pretrained(tmp_path / "out", config, params, adapters=adapters, dtype="float32")
    wanted = jax.jit(merge)(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), adapters)
    _, merged = load_pretrained(tmp_path / "out")
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Ids:
    """The special ids of a tokenizer, and one file."""

    bos_id, eos_id, pad_id, stop_ids = 1, 2, 3, (2, 7)

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_a_tokenizers_ids_go_into_the_configs(llama, tmp_path):
    save_pretrained(tmp_path / "out", *llama, tokenizer=Ids())
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 2, 3)
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert generation_settings(tmp_path / "out") == {"stop_ids": (2, 7)}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_generation_settings_fall_back_to_the_config(tmp_path):
    folder = edited(copied("llama", tmp_path / "in"), eos_token_id=[4, 5])
    (folder / "generation_config.json").unlink()
    assert generation_settings(folder) == {"stop_ids": (4, 5)}
    stated = {"eos_token_id": 9, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    found = generation_settings(folder)
    assert found == {"stop_ids": (9,), "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}


def test_a_foreign_spelling_of_names_is_read(llama, tmp_path):
    def bare(tensors):
        out = {key.removeprefix("model."): value for key, value in tensors.items()}
        return {**out, "layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}

    _, params = load_pretrained(retensored(copied("llama", tmp_path / "in"), bare))
    assert_same_tree(params, llama[1])

    def with_buffers(tensors):
        out = {key.removeprefix("transformer."): value for key, value in tensors.items()}
        masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.0.attn.masked_bias": np.zeros((), np.float32)}
        return {**out, **masks}

    _, params = load_pretrained(retensored(copied("gpt2", tmp_path / "gpt2"), with_buffers))
    assert_same_tree(params, load_pretrained(FIXTURES / "gpt2")[1])


def test_an_output_kernel_that_a_tied_checkpoint_stores_is_ignored(tmp_path):
    def stored(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    config, params = load_pretrained(retensored(copied("qwen3", tmp_path / "in"), stored))
    assert config.tie_embeddings and "head" not in params


# Reward models


@pytest.mark.parametrize("name", REWARD)
def test_rewards_of_padded_rows_are_those_of_the_reference_implementation(name, tmp_path):
    expected = np.load(FIXTURES / name / "expected.npz")
    assert is_reward_model(FIXTURES / name)
    config, params, head = load_reward_model(FIXTURES / name)

    def score(params, head, tokens):
        hidden = Transformer(config).apply({"params": params}, tokens, return_hidden=True)
        return apply_head(head, hidden)

    rewards = jax.jit(score)(params, head, expected["tokens"])
    last = np.take_along_axis(np.asarray(rewards), expected["lengths"][:, None] - 1, axis=1)[:, 0]
    np.testing.assert_allclose(last, expected["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_reward_model_comes_back_with_its_bias_and_mark(mesh, tmp_path):
    config, params, head = load_reward_model(FIXTURES / "llama_reward", mesh and make_mesh(*mesh))
    assert answer_mark(FIXTURES / "llama_reward") is None and head["bias"] == 0
    head = {"kernel": head["kernel"], "bias": head["bias"] + np.float32(0.3)}
    save_pretrained(tmp_path / "out", config, params, Ids(), head=head, answer_mark=6)
    again, loaded, loaded_head = load_reward_model(tmp_path / "out")
    assert again == config and config.tie_embeddings
    assert_same_tree(loaded, params)
    assert_same_tree(loaded_head, head)
    assert answer_mark(tmp_path / "out") == 6
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "LABEL_0"}


def test_a_reward_role_on_an_untied_base_leaves_its_output_kernel_out(llama, tmp_path):
    config, params = llama
    head = {"kernel": np.ones((config.width, 1), np.float32), "bias": np.zeros(1, np.float32)}
    save_pretrained(tmp_path / "out", config, params, head=head)
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")
    again, loaded, _ = load_reward_model(tmp_path / "out")
    assert again == dataclasses.replace(config, tie_embeddings=True)
    assert_same_tree(loaded, {key: value for key, value in params.items() if key != "head"})


# Refusals


def refusal(call, *args):
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    assert not is_checkpoint(tmp_path)
    assert "has no config.json" in refusal(load_pretrained, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert is_checkpoint(tmp_path)
    assert "cannot be read as JSON" in refusal(read_config, tmp_path)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_with_the_mend(pickled, tmp_path):
    folder = copied("llama", tmp_path / "in")
    (folder / "model.safetensors").rename(folder / pickled)
    message = refusal(load_pretrained, folder)
    assert f"pickled weights ({pickled})" in message and "save_pretrained" in message
    (folder / pickled).unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(load_pretrained, folder)


def test_a_cut_file_is_refused(tmp_path):
    path = copied("llama", tmp_path / "in") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is cut short or damaged" in refusal(load_pretrained, path.parent)
    path.write_bytes(b"\x01")
    assert "model.safetensors is cut short or damaged" in refusal(load_pretrained, path.parent)


def test_a_missing_shard_is_named(llama, tmp_path):
    save_pretrained(tmp_path / "out", *llama, shard_bytes=20_000)
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal(load_pretrained, tmp_path / "out")
    assert f"names 1 files that are not there ({shard.name})" in message


def test_missing_tensors_are_named_up_to_three(tmp_path):
    folder = copied("llama", tmp_path / "in")
    retensored(folder, lambda t: {k: v for k, v in t.items() if "layers.1" not in k})
    message = refusal(load_pretrained, folder)
    assert "lacks model.layers.1.input_layernorm.weight, " in message and "and 13 more" in message


def test_an_untied_checkpoint_without_an_output_kernel_is_refused(tmp_path):
    folder = retensored(
        copied("llama", tmp_path / "in"), lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"}
    )
    assert "lacks lm_head.weight" in refusal(load_pretrained, folder)


def test_unknown_tensors_are_named(tmp_path):
    def more(tensors):
        return {**tensors, "model.layers.0.self_attn.q_norm.weight": np.ones(10, np.float32)}

    message = refusal(load_pretrained, retensored(copied("llama", tmp_path / "in"), more))
    assert "do not belong to it: model.layers.0.self_attn.q_norm.weight" in message


def test_tensors_of_another_shape_are_named_with_both(tmp_path):
    message = refusal(load_pretrained, edited(copied("llama", tmp_path / "in"), vocab_size=64))
    assert "model.embed_tokens.weight (61, 24) for (64, 24)" in message


def test_quantized_tensors_are_named(tmp_path):
    def quantized(tensors):
        return {**tensors, "lm_head.weight": tensors["lm_head.weight"].astype(np.int8)}

    message = refusal(load_pretrained, retensored(copied("llama", tmp_path / "in"), quantized))
    assert "lm_head.weight I8" in message


def test_language_models_and_reward_models_are_not_taken_for_each_other():
    assert "load it with load_reward_model" in refusal(load_pretrained, FIXTURES / "llama_reward")
    assert "load it with load_pretrained" in refusal(load_reward_model, FIXTURES / "llama")


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    def two(tensors):
        return {**tensors, "score.weight": np.ones((2, 24), np.float32)}

    folder = retensored(copied("llama_reward", tmp_path / "in"), two)
    assert "scores 2 labels: a reward model has one" in refusal(load_reward_model, folder)


def test_a_folder_with_something_in_it_is_not_written_to(llama, tmp_path):
    (tmp_path / "notes").write_text("")
    assert "exists and is not empty" in refusal(save_pretrained, tmp_path, *llama)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tmp").mkdir()  # what a cut run left
    (tmp_path / "empty.tmp" / "half").write_text("")
    save_pretrained(tmp_path / "empty", *llama)
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == ["config.json", "model.safetensors"]


def test_nothing_appears_where_saving_failed(llama, tmp_path):
    config, params = llama
    broken = {**params, "final_norm": types.SimpleNamespace()}
    with pytest.raises((TypeError, AttributeError)):
        save_pretrained(tmp_path / "out", config, broken)
    assert not (tmp_path / "out").exists()


def test_an_identity_changes_with_config_and_weights(tmp_path):
    folder = copied("llama", tmp_path / "a")
    first = checkpoint_identity(folder)
    assert checkpoint_identity(copied("llama", tmp_path / "b")) == first
    edited(folder, rms_norm_eps=1e-3)
    second = checkpoint_identity(folder)
    retensored(folder, lambda t: {k: v + np.float32(1.0) for k, v in t.items()})
    assert len({first, second, checkpoint_identity(folder)}) == 3


# Memory


def test_loading_holds_little_more_than_a_tensor_on_the_host(tmp_path):
    """Peak of anonymous host memory while loading, less what it was before and less the parameters' own bytes (on a
    CPU device arrays are host memory), is under 1.3 times the largest tensor. The mapped files are not anonymous. Some
    10 MB of it are the compiler's."""
    config = TransformerConfig(
        vocab_size=16_000, width=512, layers=12, heads=8, kv_heads=8, head_dim=64, ffn=2048, tie_embeddings=False
    )
    small = dataclasses.replace(config, vocab_size=64, width=32, layers=2, head_dim=4, ffn=64)
    for name, shape in (("small", small), ("large", config)):
        params = jax.tree.map(
            lambda leaf: np.ones(leaf.shape, ml_dtypes.bfloat16),
            jax.eval_shape(lambda key, shape=shape: init_base(shape, key=key), jax.random.key(0)),
        )
        save_pretrained(tmp_path / name, dataclasses.replace(shape, dtype="bfloat16", param_dtype="bfloat16"), params)
    script = Path(__file__).parent / "measure_loading.py"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    out = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=True, timeout=120, env=environment
    ).stdout
    held, parameters = (int(word) for word in out.split()[-2:])
    largest, stacked = config.vocab_size * config.width * 4, config.layers * config.width * config.ffn * 4
    assert parameters > 250e6 and stacked > 1.5 * largest  # a stacked leaf on the host would show
    assert held < 1.3 * largest, f"{held / largest:.2f} of the largest tensor"


# A real model


@pytest.mark.skipif(not STORIES.is_dir(), reason="stories260k is not here")
def test_a_real_model_speaks():
    config, params = load_pretrained(STORIES)
    expected = json.loads((STORIES / "expected.json").read_text())
    tokens = expected["greedy_tokens"]
    prompt = jnp.asarray([[1]], jnp.int32)
    rollout = generate(
        config,
        params,
        prompt,
        jnp.ones((1,), jnp.int32),
        key=jax.random.key(0),
        sampling=Sampling(max_new_tokens=200, temperature=0.0, stop_ids=()),
    )
    assert [1, *np.asarray(rollout.tokens)[0].tolist()][: len(tokens)] == tokens
    stored = np.load(STORIES / "expected_logits.npz")
    logits = jax.jit(Transformer(config).apply)({"params": params}, stored["tokens"][None])[0]
    np.testing.assert_allclose(logits, stored["logits"], rtol=0, atol=1e-3)
