"""Completing known targets from drafts: the verdicts and distances of decoding everything."""

from functools import partial

import jax
import numpy as np
import pytest
from test_distances import levenshtein

from rlhf_jax.data.table import pad_prompts
from rlhf_jax.distributed import make_mesh
from rlhf_jax.evaluation import normalized_edit_distance
from rlhf_jax.evaluation.drafts import NearTarget, complete, near_draws
from rlhf_jax.evaluation.extraction import first_divergence
from rlhf_jax.models import TransformerConfig
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.rollout import Sampling, generate
from rlhf_jax.rollout.batches import answer_all
from rlhf_jax.rollout.reading import read_answers

CONFIG = TransformerConfig(
    vocab_size=61, layers=1, width=16, heads=2, kv_heads=1, head_dim=8, ffn=24, context=64, tie_embeddings=False
)
SPEC = RoleSpec(CONFIG)
STOPS, LONGEST, NEAR = (3,), 20, 0.1
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def weights():
    params = jax.jit(partial(init_base, CONFIG))(key=jax.random.key(0))
    return {"base": {**params, "embedding": 30 * params["embedding"], "head": 2 * params["head"]}}


@pytest.fixture(scope="module")
def mesh():
    mesh = make_mesh(2, 1, 1, jax.devices()[:2])
    with jax.set_mesh(mesh):
        yield mesh


def greedily(weights, mesh, prompts):
    """Greedy answers without their stop tokens, by decoding all of them to the end."""
    tokens, lengths, ended = answer_all(
        SPEC,
        weights,
        prompts,
        np.arange(len(prompts), dtype=np.int32),
        key=jax.random.key(1),
        sampling=Sampling(LONGEST, temperature=0.0, stop_ids=STOPS),
        batch_size=24,
        mesh=mesh,
        name="all",
    )
    return tokens, lengths - ended


def edited(text, edits):
    """A text with so many edits at random places, none of them a stop token."""
    text = list(text)
    for _ in range(edits):
        place = int(rng.integers(len(text)))
        kind = rng.integers(3)
        if kind == 0:
            text[place] = int(rng.integers(4, 61))
        elif kind == 1 and len(text) > 2:
            del text[place]
        elif len(text) < LONGEST:
            text.insert(place, int(rng.integers(4, 61)))
    return text


@pytest.fixture(scope="module")
def secrets(weights, mesh):
    """Prompts, targets with 0 to 4 edits or all random, and the completions and distances of decoding everything."""
    prompts = [rng.integers(4, 61, rng.integers(1, 9)).tolist() for _ in range(120)]
    tokens, lengths = greedily(weights, mesh, prompts)
    targets = []
    for i, (row, n) in enumerate(zip(tokens, lengths, strict=True)):
        own = edited(row[:n].tolist() if n > 1 else [7, 8], i % 5)
        targets.append(own if i % 6 else rng.integers(4, 61, int(rng.integers(2, LONGEST))).tolist())
    cut = np.minimum(lengths, [len(target) for target in targets]).astype(np.int32)
    padded = pad_prompts(targets, LONGEST)
    distance = np.asarray(normalized_edit_distance(tokens, cut, padded["prompts"], padded["lengths"]))
    return prompts, targets, [row[:n].tolist() for row, n in zip(tokens, cut, strict=True)], distance


def agreement(weights, prompts, targets):
    asked, wanted = pad_prompts(prompts, 8), pad_prompts(targets, LONGEST)
    fields = asked["prompts"], asked["lengths"], wanted["prompts"], wanted["lengths"]
    reading = read_answers(SPEC, weights, *fields, Sampling(LONGEST))
    return first_divergence(reading.greedy, wanted["lengths"])


def completed(weights, mesh, secrets, **kwargs):
    prompts, targets, _, _ = secrets
    agreed = agreement(weights, prompts, targets)
    fields = dict(near=NEAR, stop_ids=STOPS, batch_size=24, mesh=mesh, name="drafts") | kwargs
    return complete(SPEC, weights, prompts, targets, agreed, **fields), agreed


def test_verdicts_are_those_of_decoding_everything(weights, mesh, secrets):
    found, agreed = completed(weights, mesh, secrets)
    _, targets, _, distance = secrets
    lengths = np.asarray([len(target) for target in targets])
    np.testing.assert_array_equal(found.distance <= NEAR + 1e-6, distance <= NEAR + 1e-6)
    near, exact = int((distance <= NEAR + 1e-6).sum()), int((agreed == lengths).sum())
    assert 20 < exact < near < 80  # some are near without being verbatim, and as many are not
    known = ~found.censored
    np.testing.assert_allclose(found.distance[known], distance[known], rtol=1e-6)
    assert (distance[~known] >= found.distance[~known] - 1e-6).all() and found.distance[~known].min() > NEAR
    assert (~known).sum() > 20


def test_without_a_limit_every_completion_is_decoded_to_its_end(weights, mesh, secrets):
    found, _ = completed(weights, mesh, secrets, near=1.0, buckets=(4, 12))
    texts = [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
    assert texts == secrets[2] and not found.censored.any()
    np.testing.assert_allclose(found.distance, secrets[3], rtol=1e-6)


def test_rows_of_which_more_is_asked_are_decoded_to_the_end(weights, mesh, secrets):
    every_third = np.arange(len(secrets[0])) % 3 == 0
    found, _ = completed(weights, mesh, secrets, whole=every_third)
    texts = [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]
    assert [t for t, w in zip(texts, every_third, strict=True) if w] == secrets[2][::3]
    assert found.censored[~every_third].any() and not found.censored[every_third].any()


def drawn(weights, mesh, prompts, targets, draws, temperature, near):
    sampling = Sampling(1, temperature=temperature, top_k=5, stop_ids=STOPS)
    ids = np.arange(len(prompts), dtype=np.int32) + 100
    fields = dict(draws=draws, sampling=sampling, near=near, key=jax.random.key(4), row_ids=ids)
    return near_draws(SPEC, weights, prompts, targets, **fields, batch_size=48, mesh=mesh, name="draws")


def test_greedy_draws_come_near_where_the_completion_does(weights, mesh, secrets):
    prompts, targets, _, distance = secrets
    found = drawn(weights, mesh, prompts, targets, 2, 0.0, NEAR)
    np.testing.assert_array_equal(found, 2 * (distance <= NEAR + 1e-6))


def test_sampled_draws_are_counted_as_if_all_were_decoded_to_their_end(weights, mesh, secrets):
    """At a distance of one half, which some draws reach and others do not."""
    prompts, targets, draws = secrets[0][:24], secrets[1][:24], 4
    found = drawn(weights, mesh, prompts, targets, draws, 0.3, 0.5)
    asked, wanted = pad_prompts(prompts, 8), pad_prompts(targets, LONGEST)
    rollout = generate(
        CONFIG,
        weights["base"],
        asked["prompts"],
        asked["lengths"],
        key=jax.random.key(4),
        sampling=Sampling(LONGEST, temperature=0.3, top_k=5, stop_ids=STOPS),
        row_ids=np.arange(24, dtype=np.int32) + 100,
        samples=draws,
    )
    repeated, ends = (np.repeat(x, draws, axis=0) for x in (wanted["prompts"], wanted["lengths"]))
    cut = np.minimum(rollout.lengths - rollout.ended, ends)
    distance = np.asarray(normalized_edit_distance(rollout.tokens, cut, repeated, ends)).reshape(-1, draws)
    np.testing.assert_array_equal(found, (distance <= 0.5 + 1e-6).sum(1))
    assert 10 < found.sum() < 80 and len(set(found.tolist())) > 2


def test_what_a_row_can_still_become_is_never_more_than_it_becomes():
    """Every prefix of 200 pairs, against all that the rest may be: nothing more, or up to the target's length."""
    observe = jax.jit(NearTarget.observe)
    for _ in range(40):
        n = int(rng.integers(1, 8))
        target, text = rng.integers(0, 3, n), rng.integers(0, 3, n)
        watch = NearTarget(
            targets=target[None].astype(np.int32),
            lengths=np.array([n], np.int32),
            written=np.array([0], np.int32),
            row=np.arange(n + 1, dtype=np.int32)[None],
            limit=np.array([n], np.int32),
            whole=np.array([False]),
        )
        for i in range(n):
            ends = [levenshtein(text[:stop], target) for stop in range(i, n + 1)]
            best = [
                levenshtein([*text[:i], *rest], target)
                for stop in range(n - i + 1)
                for rest in (target[n - stop :], target[i : i + stop])
            ]
            assert int(watch.least[0]) <= min(ends + best)
            watch, _ = observe(watch, text[i : i + 1].astype(np.int32), np.array([True]))
        assert int(watch.row[0, n]) == levenshtein(text, target)
