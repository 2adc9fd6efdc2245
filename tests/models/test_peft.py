"""PEFT adapters: what is read computes what PEFT computes, and what is written reads back as the same function."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.errors import UserError
from rlhf_jax.models import LoraConfig, Transformer
from rlhf_jax.models.heads import apply_head
from rlhf_jax.models.lora import init_adapters, scaled
from rlhf_jax.models.peft import is_peft, load_peft, load_peft_head, peft_base, save_peft
from rlhf_jax.models.pretrained import load_pretrained, load_reward_model, read_config

FIXTURES = Path(__file__).parent / "fixtures"
CAUSAL = ["gpt2_lora", "gpt_neox_lora", "llama_lora", "llama_ranks", "llama_rslora"]


def copied(name, folder):
    shutil.copytree(FIXTURES / name, folder)
    return folder


def edited(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def retensored(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


def base_of(name):
    return FIXTURES / peft_base(FIXTURES / name)


def deltas(config, lora, adapters):
    """{projection: (layers, d_in, d_out)}: what the adapters add to the weights."""
    return {t: np.einsum("ldr,lro->ldo", leaf["a"], leaf["b"]) for t, leaf in scaled(adapters, lora).items()}


def assert_same_function(config, a, b):
    first, second = deltas(config, *a), deltas(config, *b)
    assert first.keys() == second.keys()
    for target in first:
        np.testing.assert_allclose(first[target], second[target], rtol=0, atol=1e-5, err_msg=target)


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_peft(name):
    config, params = load_pretrained(base_of(name))
    lora, adapters = load_peft(FIXTURES / name, config)
    expected = np.load(FIXTURES / name / "expected.npz")
    apply = jax.jit(Transformer(config).apply)
    logits = apply({"params": params}, expected["tokens"], adapters=scaled(adapters, lora))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-4)


def test_rewards_of_an_adapted_classifier_are_those_of_peft():
    name = "llama_reward_lora"
    config, params, _ = load_reward_model(base_of(name))
    lora, adapters = load_peft(FIXTURES / name, config)
    head, mark = load_peft_head(FIXTURES / name, config)
    assert mark is None and head["bias"] == 0
    expected = np.load(FIXTURES / name / "expected.npz")

    def score(params, adapters, tokens):
        hidden = Transformer(config).apply({"params": params}, tokens, adapters=adapters, return_hidden=True)
        return apply_head(head, hidden)

    rewards = np.asarray(jax.jit(score)(params, scaled(adapters, lora), expected["tokens"]))
    last = rewards[np.arange(len(rewards)), expected["lengths"] - 1]
    np.testing.assert_allclose(last, expected["scores"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2_lora", "gpt_neox_lora", "llama_lora", "llama_rslora"])
def test_an_adapter_is_exported_byte_for_byte(name, tmp_path):
    config = read_config(base_of(name))
    lora, adapters = load_peft(FIXTURES / name, config)
    save_peft(tmp_path / "out", config, lora, adapters, base_path="somewhere")
    before = load_file(FIXTURES / name / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)
    assert is_peft(tmp_path / "out") and peft_base(tmp_path / "out") == "somewhere"
    again, loaded = load_peft(tmp_path / "out", config)
    assert again == lora and loaded.keys() == adapters.keys()


def test_modules_of_several_ranks_and_alphas_become_one_adapter():
    config = read_config(base_of("llama_ranks"))
    lora, adapters = load_peft(FIXTURES / "llama_ranks", config)
    assert lora == LoraConfig(rank=5, alpha=15.0, targets=("k", "up"))  # scales: k 6/3 and 9/3, up 6/5
    assert adapters["k"]["a"].shape == (2, 24, 5) and not adapters["k"]["a"][..., 3:].any()
    stored = load_file(FIXTURES / "llama_ranks" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.self_attn.k_proj.lora_{}.weight"
    wanted = 2.0 * (stored[path.format("B")] @ stored[path.format("A")]).T
    np.testing.assert_allclose(deltas(config, lora, adapters)["k"][0], wanted, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("base", ["gpt2", "gpt_neox"])
def test_separate_adapters_of_a_fused_module_become_one_of_their_ranks_together(base, rslora, tmp_path):
    config = read_config(FIXTURES / base)
    lora = LoraConfig(rank=2, alpha=3.0, targets=("q", "v", "down"), rslora=rslora)
    adapters = init_adapters(config, lora, key=jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), adapters)
    save_peft(tmp_path / "out", config, lora, adapters)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}[base]
    assert settings["rank_pattern"] == {fused: 4} and settings["r"] == 2
    scale = settings["alpha_pattern"][fused] / (4**0.5 if rslora else 4)
    assert scale == pytest.approx(lora.scale, rel=1e-12)
    again, loaded = load_peft(tmp_path / "out", config)
    found, wanted = deltas(config, again, loaded), deltas(config, lora, adapters)
    assert not found.pop("k").any()  # part of the module, and not adapted
    assert found.keys() == wanted.keys()
    for target in wanted:
        np.testing.assert_allclose(found[target], wanted[target], rtol=0, atol=1e-4, err_msg=target)


def test_layers_that_an_adapter_leaves_out_are_not_changed(tmp_path):
    folder = copied("llama_lora", tmp_path / "in")
    retensored(folder, lambda t: {key: value for key, value in t.items() if ".layers.1." in key})
    edited(folder, layers_to_transform=[1])
    config = read_config(base_of("llama_lora"))
    part, whole = (deltas(config, *load_peft(path, config)) for path in (folder, FIXTURES / "llama_lora"))
    for target in whole:
        assert not part[target][0].any()
        np.testing.assert_array_equal(part[target][1], whole[target][1])


def test_a_head_comes_back_with_its_bias_and_mark(tmp_path):
    config = read_config(base_of("llama_reward_lora"))
    lora, adapters = load_peft(FIXTURES / "llama_reward_lora", config)
    assert load_peft_head(FIXTURES / "llama_lora", config) == (None, None)
    kernel = np.arange(config.width, dtype=np.float32)[:, None]
    head = {"kernel": kernel, "bias": np.full((1,), 0.3, np.float32)}
    save_peft(tmp_path / "out", config, lora, adapters, head=head, answer_mark=6)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    found, mark = load_peft_head(tmp_path / "out", config)
    assert mark == 6
    np.testing.assert_array_equal(found["kernel"], kernel)
    np.testing.assert_array_equal(found["bias"], head["bias"])
    assert_same_function(config, (lora, adapters), load_peft(tmp_path / "out", config))


# Refusals


def refusal(folder, base="llama"):
    with pytest.raises(UserError) as error:
        load_peft(folder, read_config(FIXTURES / base))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora (True) is not supported"),
        ({"lora_bias": True}, "lora_bias (True) is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication ([[0, 2]]) is not supported"),
        ({"bias": "all"}, 'bias "all" is not supported, "none" is'),
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights "pissa" changes the base'),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(changes, message, tmp_path):
    assert message in refusal(edited(copied("llama_lora", tmp_path / "in"), **changes))


def test_an_adapter_for_another_base_is_refused_with_both_sizes(tmp_path):
    message = refusal(FIXTURES / "llama_lora", base="llama_linear")  # its heads are of 6, not 10
    assert "is an adapter for another base" in message
    assert "q_proj.lora_B.weight is (40, 3), this base writes 24 there, not 40" in message
    message = refusal(FIXTURES / "llama_lora", base="gpt2")
    assert "adapts " in message and "a gpt2 of 2 layers has c_attn" in message


def test_a_module_that_adapters_do_not_reach_is_named(tmp_path):
    def more(tensors):
        names = {"A": (3, 24), "B": (61, 3)}
        new = {f"base_model.model.lm_head.lora_{side}.weight": np.ones(s, np.float32) for side, s in names.items()}
        return {**tensors, **new}

    message = refusal(retensored(copied("llama_lora", tmp_path / "in"), more))
    assert "lm_head.lora_A.weight" in message and "a llama of 2 layers has q_proj, k_proj" in message


def test_half_an_adapter_is_refused(tmp_path):
    def half(tensors):
        return {key: value for key, value in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in key}

    message = refusal(retensored(copied("llama_lora", tmp_path / "in"), half))
    assert "one of lora_A and lora_B of model.layers.1.self_attn.q_proj" in message


def test_pickled_and_missing_adapters_are_refused(tmp_path):
    folder = copied("llama_lora", tmp_path / "in")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickled adapter (adapter_model.bin)" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert "has no adapter_model.safetensors" in refusal(folder)
    assert "has no adapter_config.json" in refusal(FIXTURES / "llama")


def test_a_head_of_another_width_is_refused():
    with pytest.raises(UserError, match=r"score.weight is \(1, 24\), a reward head here is \(1, 40\)"):
        load_peft_head(FIXTURES / "llama_reward_lora", read_config(FIXTURES / "gpt_neox"))


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path):
    config = read_config(base_of("llama_lora"))
    lora, adapters = load_peft(FIXTURES / "llama_lora", config)
    (tmp_path / "notes").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        save_peft(tmp_path, config, lora, adapters)
