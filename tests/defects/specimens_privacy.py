"""Defects of a private step: of the clip, of the noise, and of what is shown."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import truths_privacy as truths
from harness import Patches, Specimen

from rlhf_jax.privacy import clipping, noise
from rlhf_jax.privacy import gradient as gradients
from rlhf_jax.stages import private_ppo

# --- the clip ---------------------------------------------------------------------------------------------------------


def norms_of(leaves: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in leaves))


def scaled(grads: Any, norms: Any, clip_norm: float, present: Any) -> Any:
    factors = jnp.where(present, jnp.minimum(1.0, clip_norm / norms), 0.0)
    return jax.tree.map(lambda g: jnp.tensordot(factors, g, 1), grads)


def clips(total: Any) -> Any:
    """Another (gradients of each unit, present, clip norm) -> sum in the clip's place."""

    def spoiled(losses: Any, grads: Any, present: Any, clip_norm: Any) -> Any:
        norms = norms_of(jax.tree.leaves(grads))
        return clipping.Clipped(total(grads, present, clip_norm), norms, losses)

    return lambda patch: patch.set(clipping, "_clip_and_sum", spoiled)


def each_leaf(grads: Any, present: Any, clip_norm: Any) -> Any:
    return jax.tree.map(lambda g: scaled(g, norms_of([g]), clip_norm, present), grads)


def the_sum(grads: Any, present: Any, clip_norm: Any) -> Any:
    total = scaled(grads, 1.0, np.inf, present)
    norm = norms_of([leaf[None] for leaf in jax.tree.leaves(total)])
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, clip_norm / norm), total)


def all_but_the_head(grads: Any, present: Any, clip_norm: Any) -> Any:
    inside = scaled(grads["adapters"], norms_of(jax.tree.leaves(grads["adapters"])), clip_norm, present)
    return {"adapters": inside, "head": scaled(grads["head"], 1.0, np.inf, present)}


def norm_without_the_embedding(grads: Any, present: Any, clip_norm: Any) -> Any:
    return scaled(grads, norms_of([grads["adapters"]["kernel"], grads["head"]]), clip_norm, present)


def everybody(grads: Any, present: Any, clip_norm: Any) -> Any:
    return scaled(grads, norms_of(jax.tree.leaves(grads)), clip_norm, True)


def nothing_is_clipped(patch: Patches) -> None:
    patch.set(clipping, "clip_factors", lambda norms, counts, *rest: counts.astype(jnp.float32))


def rows_are_clipped_one_by_one(patch: Patches) -> None:
    def wrapper(make: Any) -> Any:
        def by_row(objective: Any, clip_norm: Any, *, units_rows: int, **rest: Any) -> Any:
            total = make(objective, clip_norm, units_rows=1, **rest)
            return lambda trainable, frozen, batch, present: total(
                trainable, frozen, batch, jnp.repeat(present, units_rows)
            )

        return by_row

    patch.wrap(gradients, "clipped_sum", wrapper)


def not_finite_counts(patch: Patches) -> None:
    def wrapper(whole: Any) -> Any:
        return lambda squares, losses, present: (present, whole(squares, losses, present)[1])

    patch.wrap(clipping, "whole_norms", wrapper)


def weights_of_all(patch: Patches) -> None:
    def over_all(out: Any, units: int) -> Any:
        return out.losses.reshape(units, -1).sum(-1) / out.weights.sum()

    patch.set(clipping, "_unit_losses", over_all)


# --- noise ------------------------------------------------------------------------------------------------------------


def spoils_the_step(*spoils: Any) -> Any:
    """Puts spoil(step, batch, gradient, metrics) -> (gradient, metrics) behind every private gradient."""

    def inject(patch: Patches) -> None:
        def wrapper(make: Any) -> Any:
            def spoiled(objective: Any, step: Any, *rest: Any) -> Any:
                inner = make(objective, step, *rest)

                def gradient(trainable: Any, frozen: Any, batch: Any) -> Any:
                    return spoils[0](step, batch, *inner(trainable, frozen, batch))

                return gradient

            return spoiled

        for module in (gradients, private_ppo):
            patch.wrap(module, "private_gradient", wrapper)

    return inject


def over_the_drawn(step: Any, batch: Any, grads: Any, metrics: Any) -> Any:
    drawn = jnp.maximum(batch.present.sum(), 1)
    return jax.tree.map(lambda g: g * step.expected_batch / drawn, grads), metrics


def nothing_for_nobody(step: Any, batch: Any, grads: Any, metrics: Any) -> Any:
    return jax.tree.map(lambda g: jnp.where(batch.present.any(), g, 0.0), grads), metrics


def raw_loss(step: Any, batch: Any, grads: Any, metrics: Any) -> Any:
    return grads, metrics | {"loss/raw": batch.rows["x"].mean()}


def noise_is_scaled(by: Any) -> Any:
    """Noise `by`(expected batch) times as strong as it is to be."""

    def inject(patch: Patches) -> None:
        def wrapper(privatized: Any) -> Any:
            def spoiled(summed: Any, key: Any, *, noise_multiplier: float, expected_batch: float, **rest: Any) -> Any:
                sigma = noise_multiplier * by(expected_batch)
                return privatized(summed, key, noise_multiplier=sigma, expected_batch=expected_batch, **rest)

            return spoiled

        patch.wrap(gradients, "privatized", wrapper)

    return inject


def one_key_for_leaves(patch: Patches) -> None:
    patch.set(noise, "_fold_text", lambda key, text: key)


def bfloat16_noise(patch: Patches) -> None:
    def coarse(tree: Any, key: Any, stddev: float) -> Any:
        def noisy(path: Any, leaf: Any) -> Any:
            own = noise._fold_text(key, jax.tree_util.keystr(path))
            return leaf + stddev * jax.random.normal(own, leaf.shape, jnp.bfloat16).astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(noisy, tree)

    patch.set(noise, "add_noise", coarse)


def root_of_a_seed(patch: Patches) -> None:
    patch.set(noise, "new_root", lambda: (0, int(np.random.default_rng(7).integers(1 << 32))))


def root_for_everybody(patch: Patches) -> None:
    def wrapper(write: Any) -> Any:
        def open_to_all(path: Any, root: Any) -> None:
            write(path, root)
            path.chmod(0o644)

        return open_to_all

    patch.wrap(noise, "_write_root", wrapper)


def share_is_not_taken_off(patch: Patches) -> None:
    patch.set(gradients.PrivateStep, "gradient_noise", property(lambda step: step.noise_multiplier))


def absent_are_in_the_figures(patch: Patches) -> None:
    def wrapper(released: Any) -> Any:
        return lambda step, figures, batch: released(
            step, figures, batch._replace(present=jnp.ones_like(batch.present))
        )

    patch.wrap(gradients, "_released", wrapper)


T = truths
CLIPPED = r"moves (the sum|a step) by (1\.[1-9]|[2-9]\.|\d\d+\.|nan|inf)"


def of_the_clip(name: str, source: str, inject: Any) -> Specimen:
    """A unit then moves the sum by 1.1 times the clip norm at least."""
    return Specimen(name, source, inject, T.unit_moves_the_sum_by_its_bound, CLIPPED)


SPECIMENS = [
    of_the_clip("nothing_is_clipped", "a slip: factors of 1", nothing_is_clipped),
    of_the_clip("each_leaf_is_clipped", "a slip: the norm of a leaf for that of the whole", clips(each_leaf)),
    of_the_clip("clip_after_the_sum", "a slip: the optimizer's clip for the units'", clips(the_sum)),
    of_the_clip("head_outside_the_clip", "a slip: a value head in another tree", clips(all_but_the_head)),
    of_the_clip(
        "tied_embedding_outside_the_norm",
        "ghost clipping without the tied weight",
        clips(norm_without_the_embedding),
    ),
    of_the_clip("rows_of_a_unit_clipped_one_by_one", "a slip: records for users", rows_are_clipped_one_by_one),
    Specimen(
        "padding_is_counted",
        "jax-privacy#223: a skipped tail",
        clips(everybody),
        T.absent_is_not_counted,
        "not there are in the sum",
    ),
    Specimen(
        "nan_of_one_unit",
        "a slip: 0 times infinity",
        not_finite_counts,
        T.unit_that_is_not_finite_is_left_out,
        "in everybody's sum",
    ),
    Specimen(
        "denominator_of_the_batch",
        "TRL: a mean over all tokens of the minibatch",
        weights_of_all,
        T.share_is_a_unit_s_own,
        "depends on another one's length",
    ),
    Specimen(
        "division_by_the_drawn",
        "Opacus#571, arXiv 2310.16960 algorithm 2",
        spoils_the_step(over_the_drawn),
        T.divisor_is_public,
        "divided by how many were drawn",
    ),
    Specimen(
        "noise_for_the_sum_on_the_mean",
        "jax-privacy#383",
        noise_is_scaled(lambda expected: expected),
        T.empty_batch_is_noise_of_its_scale,
        r"gives 4\.\d\d of its noise",
    ),
    Specimen(
        "noise_for_the_mean_on_the_sum",
        "arXiv 2202.12219: a factor of the batch size",
        noise_is_scaled(lambda expected: 1 / expected),
        T.empty_batch_is_noise_of_its_scale,
        r"gives 0\.2\d of its noise",
    ),
    Specimen(
        "empty_batch_without_noise",
        "Opacus: an empty batch is skipped",
        spoils_the_step(nothing_for_nobody),
        T.empty_batch_is_noise_of_its_scale,
        r"gives 0\.00 of its noise",
    ),
    Specimen(
        "one_noise_for_all_leaves",
        "a slip: one key for the tree",
        one_key_for_leaves,
        T.leaves_have_noise_of_their_own,
        "two leaves have one noise",
    ),
    Specimen(
        "noise_in_bfloat16",
        "jax.random.normal has 128 values in bfloat16",
        bfloat16_noise,
        T.noise_is_fine_grained,
        r"noise has \d{2,3} values",
    ),
    Specimen(
        "rbg_keys",
        "a faster generator for everything",
        lambda patch: patch.set(noise, "root_key", lambda root: jax.random.key(root[0], impl="rbg")),
        T.keys_are_threefry,
        "drawn with rbg keys",
    ),
    Specimen(
        "root_of_an_integer_seed",
        "jax.random.key(2**40 + 5) is key(5)",
        root_of_a_seed,
        T.roots_are_entropy,
        "fewer than 64 random bits",
    ),
    Specimen(
        "root_in_a_file_for_everybody",
        "a slip: the default umask",
        root_for_everybody,
        T.root_is_its_owner_s,
        "others than its owner may use",
    ),
    Specimen(
        "raw_metric",
        "jax-privacy: auxiliary information",
        spoils_the_step(raw_loss),
        T.released_alone_is_shown,
        "raw loss",
    ),
    Specimen(
        "figures_without_their_share",
        "a slip: noise of the gradient as if nothing else were shown",
        share_is_not_taken_off,
        T.released_figures_have_their_part_of_the_budget,
        r"spend 1\.\d\d of the budget",
    ),
    Specimen(
        "padding_in_the_figures",
        "a slip: the mask left out",
        absent_are_in_the_figures,
        T.released_figures_are_of_those_present,
        "add up to 6",
    ),
]
