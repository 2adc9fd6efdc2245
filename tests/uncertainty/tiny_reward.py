"""A tiny reward model trained on synthetic pairs: which of two answers holds more of some tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.models.heads import init_head
from rlhf_jax.models.lora import LoraConfig, init_adapters
from rlhf_jax.models.roles import RoleSpec, init_base
from rlhf_jax.objectives import bradley_terry_loss
from rlhf_jax.rollout.scoring import last_scores
from rlhf_jax.uncertainty.fit import fit
from rlhf_jax.uncertainty.posterior import Posterior, precisions

WIDTH, VOCAB, LENGTH = 16, 24, 10


def tiny_spec(layers=2, width=WIDTH, rank=2, heads=2):
    config = TransformerConfig(
        vocab_size=VOCAB,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=1,
        head_dim=width // heads,
        ffn=width + 8,
        context=32,
    )
    return RoleSpec(config, LoraConfig(rank, 2.0 * rank, ("v", "down")))


def pairs(count, seed=0, length=LENGTH, low=0):
    """Pairs whose preferred answer holds more of the tokens from `low` to 7, with some noise."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, length + 1, (count, 2)).astype(np.int32)
    tokens, good = rng.integers(8, VOCAB, (count, 2, length)), rng.integers(low, 8, (count, 2, length))
    quality = rng.uniform(size=(count, 2))
    tokens = np.where(rng.uniform(size=tokens.shape) < quality[..., None], good, tokens)
    tokens = np.where(np.arange(length) < lengths[..., None], tokens, 0).astype(np.int32)
    utility = 6 * quality + rng.logistic(size=(count, 2)) / 2
    first = utility.argmax(1)
    order = np.stack([first, 1 - first], 1)
    return {
        "tokens": np.take_along_axis(tokens, order[..., None], 1),
        "lengths": np.take_along_axis(lengths, order, 1),
        "weight": np.ones(count, np.float32),
    }


@functools.cache
def trained(spec, count=120, steps=40, seed=0):
    """(weights, the pairs they were trained on)."""
    data = pairs(count, seed)
    key = jax.random.key(seed)
    weights = {
        "base": init_base(spec.config, key=key),
        "adapters": init_adapters(spec.config, spec.lora, key=jax.random.fold_in(key, 1)),
        "head": init_head(spec.config.width, (spec.config.width + 1) ** -0.5, key=jax.random.fold_in(key, 2)),
    }
    optimizer = optax.adamw(4e-3, weight_decay=0.01)
    base, own = weights.pop("base"), weights
    rows, lengths = data["tokens"].reshape(2 * count, -1), data["lengths"].reshape(-1)

    @jax.jit
    def step(own, state):
        def loss(own):
            scores = last_scores(spec, {"base": base, **own}, rows, lengths).reshape(count, 2)
            return bradley_terry_loss(scores[:, 0], scores[:, 1]).mean()

        grads = jax.grad(loss)(own)
        updates, state = optimizer.update(grads, state, own)
        return optax.apply_updates(own, updates), state

    state = optimizer.init(own)
    for _ in range(steps):
        own, state = step(own, state)
    return {"base": base, **own}, data


def batches_of(data, size):
    """The function that goes over data in batches of one size, the last filled up with rows of weight 0."""
    count = len(data["weight"])

    def batches():
        for start in range(0, count, size):
            part = {name: x[start : start + size] for name, x in data.items()}
            missing = size - len(part["weight"])
            padded = {name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) for name, x in part.items()}
            padded["lengths"] = np.maximum(padded["lengths"], 1)
            yield {name: jnp.asarray(x) for name, x in padded.items()}

    return batches


def fitted(spec, weights, data, size=40, **fields):
    settings = dict(scope="all", structure="kronecker", factors="tokens", corrected=False, rank=0, scale=1.0)
    settings |= {"records": len(data["weight"]), "key": jax.random.key(7), **fields}
    return fit(spec, weights, batches_of(data, size), **settings)


def posterior_of(curvature, precision, scale=1.0, scope="all"):
    one = jnp.ones(())
    return Posterior(curvature.factors, precisions(curvature.factors, precision), scale * one, one, one, scope)
