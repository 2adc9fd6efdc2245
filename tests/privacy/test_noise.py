"""Privacy noise: how it is spread, what keys it, and that its root stays secret."""

import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from rlhf_jax.distributed import make_mesh
from rlhf_jax.errors import UserError
from rlhf_jax.privacy.noise import add_noise, load_or_make_root, new_root, privatized, root_key, step_key

ROOT = (0x01234567, 0x89ABCDEF)
DRAWS = 1 << 20


def key_of(run_nonce="run", stage="sft", purpose="gradient", step=0, root=ROOT):
    return step_key(root_key(root), run_nonce, stage, purpose, step)


@jax.jit
def long_draw(key):
    return add_noise({"w": jnp.zeros(DRAWS)}, key, 1.0)["w"]


def test_noise_is_normal():
    noise = np.asarray(long_draw(key_of()), np.float64)
    assert noise.std() == pytest.approx(1.0, rel=3e-3)
    assert abs(noise.mean()) < 4 / np.sqrt(DRAWS)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    assert len(np.unique(noise)) > 0.9 * DRAWS and np.abs(noise).max() > 4


def test_the_standard_deviation_is_asked_for():
    tree = {"w": jnp.full(1000, 7.0)}
    one, many = (np.asarray(add_noise(tree, key_of(), stddev)["w"]) - 7 for stddev in (1.0, 250.0))
    np.testing.assert_allclose(many, 250 * one, rtol=1e-4, atol=1e-3)


def test_every_step_stage_purpose_nonce_and_root_has_its_own_noise():
    keys = [
        key_of(),
        key_of(step=1),
        key_of(stage="reward"),
        key_of(purpose="metrics"),
        key_of(run_nonce="run 2"),
        key_of(root=(ROOT[0] + 1, ROOT[1])),
        key_of(root=(ROOT[0], ROOT[1] + 1)),
        key_of(run_nonce="runsft", stage=""),
    ]
    draws = np.stack([long_draw(key) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 4 / np.sqrt(DRAWS)


def test_noise_is_a_function_of_the_words():
    np.testing.assert_array_equal(long_draw(key_of(step=3)), long_draw(key_of(step=3)))
    traced = jax.jit(lambda step: jax.random.key_data(key_of(step=step)))(3)
    np.testing.assert_array_equal(traced, jax.random.key_data(key_of(step=3)))


def test_leaves_have_their_own_noise_whatever_stands_beside_them():
    shape = (300, 300)
    tree = {"a": jnp.zeros(shape), "b": {"a": jnp.zeros(shape)}, "c": jnp.zeros(())}
    noise = add_noise(tree, key_of(), 1.0)
    assert abs(np.corrcoef(np.ravel(noise["a"]), np.ravel(noise["b"]["a"]))[0, 1]) < 4 / 300
    np.testing.assert_array_equal(add_noise({"b": tree["b"]}, key_of(), 1.0)["b"]["a"], noise["b"]["a"])


@pytest.mark.parametrize("axes", [("data", "fsdp"), ("fsdp", "tensor"), (("data", "fsdp", "tensor"), None)])
@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2)])
def test_noise_is_the_same_on_every_mesh(shape, axes):
    zeros = {"w": np.zeros((16, 24), np.float32)}

    def noisy(tree, key):
        return add_noise(tree, key, 0.5)

    alone = jax.jit(noisy)(zeros, key_of())
    sharding = NamedSharding(make_mesh(*shape), PartitionSpec(*axes))
    spread = jax.jit(noisy, out_shardings=sharding)(jax.device_put(zeros, sharding), key_of())
    assert len(spread["w"].sharding.device_set) == 8
    np.testing.assert_array_equal(spread["w"], alone["w"])
    assert len(np.unique(alone["w"])) == 16 * 24  # no block is drawn twice


def test_both_words_and_one_generator_make_a_key():
    assert not np.array_equal(*(jax.random.key_data(root_key(root)) for root in ((1, 2), (2, 1))))
    with jax.default_prng_impl("rbg"):
        assert str(jax.random.key_impl(root_key(ROOT))) == "threefry2x32"
        with pytest.raises(ValueError, match="drawn with threefry2x32 keys, not rbg"):
            add_noise({"w": jnp.zeros(3)}, jax.random.key(0), 1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_lower_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"float32, and \['w'\] is {dtype}"):
        add_noise({"w": jnp.zeros(3, dtype)}, key_of(), 1.0)


def test_a_privatized_gradient_is_over_the_expected_batch():
    total = {"w": jnp.arange(DRAWS, dtype=jnp.float32) / DRAWS}
    exact = privatized(total, key_of(), noise_multiplier=0.0, clip_norm=np.inf, expected_batch=8.0)
    np.testing.assert_array_equal(exact["w"], total["w"] / 8)
    noisy = privatized(total, key_of(), noise_multiplier=1.5, clip_norm=0.2, expected_batch=8.0)
    added = np.asarray(noisy["w"] - exact["w"], np.float64)
    assert added.std() == pytest.approx(1.5 * 0.2 / 8, rel=3e-3)
    np.testing.assert_allclose(added, np.asarray(long_draw(key_of())) * (1.5 * 0.2 / 8), atol=1e-7)


@pytest.mark.parametrize(
    ("noise", "clip_norm", "expected", "message"),
    [
        (1.0, np.inf, 8.0, "clip_norm is inf with noise_multiplier 1: give a finite norm"),
        (-1.0, 1.0, 8.0, "noise_multiplier is -1"),
        (1.0, 1.0, 0.0, "the expected batch is 0"),
    ],
)
def test_noise_that_hides_nothing_is_refused(noise, clip_norm, expected, message):
    with pytest.raises(UserError, match=message):
        privatized({"w": jnp.zeros(2)}, key_of(), noise_multiplier=noise, clip_norm=clip_norm, expected_batch=expected)


def test_a_root_is_fresh_entropy_of_64_bits():
    words = np.array([new_root() for _ in range(500)], np.uint64)
    assert len(np.unique(words)) == 1000 and words.max() < 1 << 32
    bits = (words[..., None] >> np.arange(32, dtype=np.uint64)) & 1
    assert stats.binomtest(int(bits.sum()), bits.size).pvalue > 1e-6


def test_a_root_is_made_once_and_its_owner_s_alone(tmp_path):
    path = tmp_path / "root"
    before = os.umask(0)
    try:
        root = load_or_make_root(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_make_root(path) == root and all(0 <= word < 1 << 32 for word in root)
    assert load_or_make_root(tmp_path / "other") != root
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "root"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_root_that_others_may_use_is_refused(tmp_path, mode):
    path = tmp_path / "root"
    load_or_make_root(path)
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"others than its owner .*mode {mode:o}.*chmod 600") as error:
        load_or_make_root(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "0123456", "01234567", "01234567 89abcdeg", "01234567 89abcdef 00000000"])
def test_a_file_that_is_no_root_is_refused(tmp_path, text):
    path = tmp_path / "root"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(UserError, match="not a secret root"):
        load_or_make_root(path)


def test_a_root_s_words_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "root"
    path.touch(0o600)
    path.write_text("01234567 89abcdef\n")
    assert load_or_make_root(path) == ROOT
