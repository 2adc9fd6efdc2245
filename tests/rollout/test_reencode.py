"""A reward model with a tokenizer of its own reads text, never the policy's ids."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.chat import encode_chat
from rlhf_jax.data.tokenizer import load_tokenizer
from rlhf_jax.distributed import make_mesh
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Rollout, Sampling, checkpoint_sampling
from rlhf_jax.rollout.reencode import ForeignScores, reencode
from rlhf_jax.rollout.scoring import last_scores, with_end_token

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
SAMPLER, READER, PLAIN = (load_tokenizer(FIXTURES / name) for name in ("qwen", "llama3", "gpt2"))
CONFIG = TransformerConfig(
    vocab_size=READER.vocab_size, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=256
)
SPEC = RoleSpec(CONFIG)
WEIGHTS = {
    "base": init_base(CONFIG, key=jax.random.key(0)),
    "head": init_head(CONFIG.width, 1.0, key=jax.random.key(1)),
}
CASES = [("Say red.", " It is red.", True), ("Count: 1 2", " 3 4", False), ("é ☃ \n", "naïve\n", True)]


def answer_of(text, ended):
    return SAMPLER.encode(text) + ([SAMPLER.eos_id] if ended else [])


@pytest.mark.parametrize("prompt, text, ended", CASES)
def test_a_template_gets_turns_of_the_decoded_text(prompt, text, ended):
    ids = reencode(SAMPLER, READER, prompt, answer_of(text, ended), ended, whole_template=True)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    assert ids == encode_chat(READER, turns)[0]
    cut = reencode(SAMPLER, READER, prompt, answer_of(text, ended), ended, whole_template=False)
    assert cut == ids[: len(cut)] and cut[-1] in READER.stop_ids


@pytest.mark.parametrize("prompt, text, ended", CASES)
def test_without_a_template_the_texts_follow_each_other(prompt, text, ended):
    ids = reencode(SAMPLER, PLAIN, prompt, answer_of(text, ended), ended, whole_template=True)
    assert ids == PLAIN.encode_prompt(prompt + text) + ([PLAIN.eos_id] if ended else [])


def test_scores_equal_each_row_scored_alone():
    answers = [answer_of(text, ended) for _, text, ended in CASES]
    prompts = [prompt for prompt, _, _ in CASES]
    width = max(map(len, answers)) + 2
    rows = len(CASES)
    tokens = np.zeros((rows, width), np.int32)
    for i, answer in enumerate(answers):
        tokens[i, : len(answer)] = answer
    lengths = jnp.asarray([len(answer) for answer in answers], jnp.int32)
    ended = jnp.asarray([case[2] for case in CASES])
    blank = jnp.zeros((rows, 1), jnp.int32)
    sampling = Sampling(width, stop_ids=SAMPLER.stop_ids)
    rollout = Rollout(blank, jnp.ones((rows,), jnp.int32), jnp.asarray(tokens), lengths, ended, blank, sampling)
    mesh = make_mesh(devices=jax.devices()[:1])
    scores = ForeignScores(SPEC, WEIGHTS, READER, SAMPLER, mesh, whole_template=True)(rollout, prompts)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = reencode(SAMPLER, READER, prompt, answer, CASES[i][2], whole_template=True)
        alone = last_scores(SPEC, WEIGHTS, jnp.asarray([ids], jnp.int32), jnp.asarray([len(ids)], jnp.int32))
        np.testing.assert_allclose(scores[i], alone[0], atol=1e-5)


def test_what_a_stop_string_ended_is_read_with_an_end_token():
    tokens = jnp.asarray([[5, 6, 0], [5, 2, 0], [5, 6, 7]], jnp.int32)
    wider, lengths = with_end_token(tokens, jnp.asarray([2, 2, 3]), jnp.asarray([True, True, False]), (2, 9))
    np.testing.assert_array_equal(wider, [[5, 6, 2, 0], [5, 2, 0, 0], [5, 6, 7, 0]])
    np.testing.assert_array_equal(lengths, [3, 2, 3])
    full, more = with_end_token(tokens[2:], jnp.asarray([3]), jnp.asarray([True]), (2, 9))
    np.testing.assert_array_equal(full, [[5, 6, 7, 2]])
    assert more.tolist() == [4]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ('{"eos_token_id": [4, 5], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20}', (0.6, 20, 0.9)),
        ('{"eos_token_id": [4, 5], "temperature": 0.6}', (0.0, 0, 1.0)),
    ],
)
def test_a_checkpoint_says_how_it_wants_to_be_sampled(tmp_path, settings, expected):
    (tmp_path / "generation_config.json").write_text(settings)
    temperature, top_k, top_p = expected
    wanted = Sampling(12, temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=(4, 5))
    assert checkpoint_sampling(tmp_path, 12) == wanted
