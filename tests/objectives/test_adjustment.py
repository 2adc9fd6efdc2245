"""What uncertainty costs a score, against numbers worked by hand and samples."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objectives.adjustment import Moments, adjusted, mixture

ENSEMBLE = Moments(*map(jnp.asarray, ([2.0, -1.0], [4.0, 0.25], [0.5, -1.5], [3.0, 0.0])))
PLAIN = Moments(jnp.asarray([2.0, -1.0]))


@pytest.mark.parametrize(
    ("kind", "k", "sign", "wanted"),
    [
        ("none", 3.0, 1.0, [2.0, -1.0]),
        ("std", 0.5, 1.0, [1.0, -1.25]),
        ("std", 0.5, -1.0, [3.0, -0.75]),
        ("variance", 0.5, 1.0, [0.0, -1.125]),
        ("variance", 0.5, -1.0, [4.0, -0.875]),
        ("worst", 9.0, 1.0, [0.5, -1.5]),
        ("worst", 9.0, -1.0, [3.0, 0.0]),
        ("std", 0.0, 1.0, [2.0, -1.0]),
    ],
)
def test_uncertainty_lowers_what_is_sought_and_raises_what_is_avoided(kind, k, sign, wanted):
    np.testing.assert_allclose(adjusted(ENSEMBLE, kind, k, sign), wanted)


@pytest.mark.parametrize("kind", ["none", "std", "variance", "worst"])
def test_a_score_that_knows_no_uncertainty_stays_itself(kind):
    np.testing.assert_array_equal(adjusted(PLAIN, kind, 2.0), PLAIN.mean)


def test_the_variance_form_is_the_certainty_equivalent_of_a_gaussian():
    """mean - k variance = -(1 / (2 k)) log E exp(-2 k score)."""
    k, mean, variance = 0.3, 1.2, 0.8
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = weights @ np.exp(-2 * k * (mean + np.sqrt(variance) * nodes)) / np.sqrt(2 * np.pi)
    moments = Moments(jnp.asarray([mean]), jnp.asarray([variance]))
    np.testing.assert_allclose(adjusted(moments, "variance", k)[0], -np.log(expected) / (2 * k), rtol=1e-5)


def test_an_ensembles_moments_are_those_of_its_mixture():
    rng = np.random.default_rng(0)
    means, variances = rng.normal(size=(3, 2)), rng.uniform(0.5, 2.0, (3, 2))
    draws = means + np.sqrt(variances) * rng.standard_normal((200_000, 3, 2))
    moments = mixture(jnp.asarray(means), jnp.asarray(variances))
    np.testing.assert_allclose(moments.mean, draws.mean((0, 1)), atol=0.01)
    np.testing.assert_allclose(moments.variance, draws.transpose(2, 0, 1).reshape(2, -1).var(1), rtol=0.01)
    np.testing.assert_allclose(moments.lowest, means.min(0), rtol=1e-6)
    np.testing.assert_allclose(moments.highest, means.max(0), rtol=1e-6)
    np.testing.assert_allclose(mixture(jnp.asarray(means)).variance, means.var(0), rtol=1e-5)


def test_against_a_reference_only_differences_are_uncertain():
    means, offsets = jnp.asarray([[1.0, 0.0], [4.0, 2.0]]), jnp.asarray([[0.0, 1.0], [2.0, 2.0]])
    moments = mixture(means, offsets=offsets)
    np.testing.assert_allclose(moments.mean, [2.5, 1.0])
    np.testing.assert_allclose(moments.variance, [0.25, 0.25])  # of the differences 1, 2 and -1, 0
    np.testing.assert_allclose(moments.lowest, [2.0, 0.5])  # the least difference on the mean offset
    np.testing.assert_allclose(moments.highest, [3.0, 1.5])
