"""Sums over the training data that the posterior is made of: what one batch adds to them.

A batch has "tokens" (B, A, T) int32, "lengths" (B, A), "weight" (B,), 0 of padding rows, and where safety labels are
terms "unsafe" (B, A) and "labelled" (B,) bool. They are plain sums: batches in another order or size, or another mesh,
change them in rounding alone.

Every function returns at least "log_likelihood" () and "slope" {block: (layers, d, r)}, its gradient; but for
`corrected_squares`, a second pass. `scale` is what the head's kernel was divided by after training.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.models.lora import scaled
from rlhf_jax.models.roles import RoleSpec, Weights
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.objectives.taps import Moments, MomentTap
from rlhf_jax.uncertainty.jacobians import HEAD, Blocks, blocks_of, gradients, scores_of
from rlhf_jax.uncertainty.likelihood import Terms, directions, terms
from rlhf_jax.uncertainty.posterior import Kronecker, coordinates

Array = jax.Array
Batch = dict[str, Array]
Sketches = dict[str, Array | None]  # block -> (d, m) that moments of its large side are multiplied with; None: whole
exact = jax.lax.Precision.HIGHEST
jitted = partial(jax.jit, static_argnums=(0, 1))  # spec and scope


def _record_terms(spec: RoleSpec, scope: str, scale: Array, weights: Weights, batch: Batch) -> tuple[Terms, Blocks]:
    """The terms of a batch and their gradients {block: (B, K, layers, d, r)}."""
    along = directions(batch["tokens"].shape[1], "unsafe" in batch)
    where = batch["tokens"], batch["lengths"]
    scores, found = gradients(spec, weights, *where, along, scope=scope, scale=scale)
    return terms(scores * scale, batch), found


def _weighted(weights: Array, found: Blocks) -> Blocks:
    """{block: sum over records and terms of their weights (B, K) times their gradients}."""
    return {name: jnp.einsum("bk,bkldr->ldr", weights, g, precision=exact) for name, g in found.items()}


def _common(seen: Terms, slope: Blocks) -> dict[str, Any]:
    return {"log_likelihood": seen.log_likelihood.sum(), "slope": slope}


def _both_sides(weights: Array, g: Array, sketch: Array | None) -> tuple[Array, Array]:
    """Of gradients G (B, K, layers, d, r): sum w G G' (layers, d, d), or that times a sketch, and sum w G' G."""
    half = g * jnp.sqrt(weights)[:, :, None, None, None]
    right = half if sketch is None else jnp.einsum("bkldr,dm->bklmr", half, sketch, precision=exact)
    large = jnp.einsum("bkldr,bklmr->ldm", half, right, precision=exact)
    return large, jnp.einsum("bkldr,bklds->lrs", half, half, precision=exact)


@jitted
def record_moments(
    spec: RoleSpec, scope: str, scale: Array, sketches: Sketches, weights: Weights, batch: Batch
) -> dict[str, Any]:
    """Adds "moments" {block: (sum w G G', sum w G' G)} over terms, G a term's whole gradient."""
    seen, found = _record_terms(spec, scope, scale, weights, batch)
    moments = {name: _both_sides(seen.curvatures, g, sketches[name]) for name, g in found.items()}
    return {**_common(seen, _weighted(seen.slopes, found)), "moments": moments}


@jitted
def squares(spec: RoleSpec, scope: str, scale: Array, weights: Weights, batch: Batch) -> dict[str, Any]:
    """Adds "squares" {block: sum w G^2} over terms, G a term's gradient."""
    seen, found = _record_terms(spec, scope, scale, weights, batch)
    squared = _weighted(seen.curvatures, {name: jnp.square(g) for name, g in found.items()})
    return {**_common(seen, _weighted(seen.slopes, found)), "squares": squared}


@jitted
def corrected_squares(
    spec: RoleSpec, scope: str, scale: Array, factors: dict[str, Kronecker], weights: Weights, batch: Batch
) -> Blocks:
    """{block: sum w C^2} over terms, C a gradient in the factors' directions (George et al., arXiv 1806.03884)."""
    seen, found = _record_terms(spec, scope, scale, weights, batch)
    along = {name: jnp.square(coordinates(factors[name], g)) for name, g in found.items()}
    return _weighted(seen.curvatures, along)


@jitted
def term_gradients(spec: RoleSpec, scope: str, scale: Array, weights: Weights, batch: Batch) -> dict[str, Any]:
    """Adds "gradients" {block: (B, K, layers, d, r)} of every term, their "curvatures" and "present" (B, K)."""
    seen, found = _record_terms(spec, scope, scale, weights, batch)
    common = _common(seen, _weighted(seen.slopes, found))
    return {**common, "gradients": found, "curvatures": seen.curvatures, "present": seen.present}


@partial(jax.jit, static_argnums=0)
def token_moments(spec: RoleSpec, scale: Array, sketches: Sketches, weights: Weights, batch: Batch) -> dict[str, Any]:
    """Adds "moments" {block: (large, small)} over "tokens" (), as KFAC-expand has it (Eschenhagen et al., 2311.00636).

    Of `a` the large side is the projection's input x_t, the small one the gradient of x_t a; of `b` the large side is
    the gradient of the output, the small one x_t a. Each is the sum over the real tokens of every answer of the outer
    product with itself. Gradients are those of sqrt(w_a) s_a, with w_a = sum_k w_k u_ka^2 what the terms' curvatures
    w_k weigh answer a with; activations have the weight 1, and their moments are to be divided by the tokens: of one
    answer with one token the product is exact.

    Answers count as independent, and so do their tokens: what the gradients of a pair's two answers have in common is
    left out. The head reads one token an answer, so its moments are those of records.
    """
    assert spec.lora is not None
    tokens, lengths = batch["tokens"], batch["lengths"]
    records, answers, width = tokens.shape
    scale_of_b, along = spec.lora.scale, directions(answers, "unsafe" in batch)
    inside = jnp.arange(width) < lengths.reshape(-1, 1)
    mask = (inside & (jnp.repeat(batch["weight"], answers) > 0)[:, None]).astype(jnp.float32)

    def states(adapters: Any, zeros: dict[str, Moments]) -> Array:
        tapped = {
            target: {**leaf, "tap": _tap(mask, sketches, target, zeros[target])}
            for target, leaf in scaled(adapters, spec.lora).items()  # type: ignore[arg-type]
        }
        model: Any = Transformer(spec.config)
        last = lengths.reshape(-1, 1) - 1
        rows = tokens.reshape(-1, width)
        hidden = model.apply({"params": weights["base"]}, rows, adapters=tapped, keep=last, return_hidden=True)
        return hidden.reshape(records, answers, -1)

    zeros = {target: _no_moments(leaf, sketches, target) for target, leaf in weights["adapters"].items()}
    hidden, back = jax.vjp(states, weights["adapters"], zeros)
    seen = terms(scores_of(weights, hidden) * scale, batch)
    kernel = weights["head"]["kernel"][:, 0] * scale

    def pulled(each: Array) -> tuple[Any, dict[str, Moments]]:
        return back((each[..., None] * kernel).astype(hidden.dtype))

    head = jnp.einsum("ka,baw->bkw", along, hidden.astype(jnp.float32), precision=exact)[:, :, None, :, None]
    slope = blocks_of(pulled(seen.slopes @ along)[0], _weighted(seen.slopes, {HEAD: head})[HEAD][0])
    _, moments = pulled(jnp.sqrt(seen.curvatures @ jnp.square(along)))
    out: dict[str, tuple[Array, Array]] = {}
    for target, m in moments.items():  # the decoder's b is scaled: the output's gradient is that of b's own times less
        out[f"{target}_a"] = m.inputs, m.inner_gradients
        out[f"{target}_b"] = m.gradients * scale_of_b**2, m.inner
    out[HEAD] = _both_sides(seen.curvatures, head, sketches[HEAD])
    return {**_common(seen, slope), "tokens": mask.sum(), "moments": out}


def _tap(mask: Array, sketches: Sketches, target: str, zeros: Moments) -> MomentTap:
    """The tap of all layers."""
    layers = zeros.inner.shape[0]

    def stacked(x: Array | None) -> Array | None:
        return None if x is None else jnp.broadcast_to(x, (layers, *x.shape))

    sides = stacked(sketches[f"{target}_a"]), stacked(sketches[f"{target}_b"])
    return MomentTap(jnp.broadcast_to(mask, (layers, *mask.shape)), *sides, zeros)


def _no_moments(leaf: dict[str, Array], sketches: Sketches, target: str) -> Moments:
    layers, d_in, rank = leaf["a"].shape
    inner = jnp.zeros((layers, rank, rank))

    def large(d: int, sketch: Array | None) -> Array:
        return jnp.zeros((layers, d, d if sketch is None else sketch.shape[1]))

    sides = large(d_in, sketches[f"{target}_a"]), large(leaf["b"].shape[2], sketches[f"{target}_b"])
    return Moments(sides[0], inner, inner, sides[1])
