"""Sampling answers with fewer rows at once than prompts: a row that has ended makes room for the next prompt.

One jitted program, as `generate` is. Prompts wait on the device in a queue; between blocks of decode steps some of them
are prefilled and take the slots of rows that have ended. Slots, queue and answers are split over the mesh's batch axes
alike, and a prompt is decoded where it waits, so no cache crosses devices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from rlhf_jax.distributed.sharding import constrain
from rlhf_jax.errors import UserError
from rlhf_jax.models.cache import Cache, empty_cache
from rlhf_jax.models.config import TransformerConfig
from rlhf_jax.rollout.generate import Rollout, dead_steps, make_decoder, stop_test
from rlhf_jax.rollout.sampling import Sampling, draw, row_keys, sample_keys

Array = jax.Array


class Refilled(NamedTuple):
    """A rollout, and what decoding it took."""

    rollout: Rollout
    steps: Array  # () int32: decode steps run, each of all slots; an answer's first token is its prefill's
    prefills: Array  # () int32: prefills run


def static_steps(lengths: Array, check_every: int = 8) -> Array:
    """Decode steps that `generate` runs for answers of these lengths (B,): the longest's in whole blocks, () int32."""
    return -(-(jnp.max(lengths) - 1) // check_every) * check_every


class _Queue(struct.PyTreeNode):
    """Prompts (B, ...) in their order, and what belongs to each of their rows (B * samples, ...)."""

    prompts: Array  # (B, P) int32
    lengths: Array  # (B,) int32
    keys: Array  # (B * samples,)
    limits: Array  # (B * samples,) int32


class _Slots(struct.PyTreeNode):
    """The rows that are decoded, (slots,) each."""

    answer: Array  # int32: the row of the shard's answers that it writes; one beyond the last where it is free
    keys: Array
    prompt_lengths: Array
    limits: Array
    token: Array  # int32: the newest
    matched: Array  # int32: state of the stop strings' automaton
    drawn: Array  # int32: tokens so far
    running: Array  # bool
    ended: Array  # bool: a stop token came


class _Answers(struct.PyTreeNode):
    tokens: Array  # (B * samples, N or more)
    logprobs: Array
    lengths: Array  # (B * samples,)
    ended: Array


class _Refilling(struct.PyTreeNode):
    slots: _Slots
    keys: tuple[Array, ...]  # (slots, kv_heads, head_dim, S) a layer, as a `Cache` has them
    values: tuple[Array, ...]
    answers: _Answers
    taken: Array  # (shards,) int32: prompts that have left the queue
    steps: Array
    prefills: Array


class _Offer(struct.PyTreeNode):
    """The next prompts of the queue (n, ...), and where their rows (n * samples,) go: nowhere those without room."""

    prompts: Array
    lengths: Array
    keys: Array
    limits: Array
    answer: Array  # int32, beyond the last where there is no room
    slot: Array  # int32, beyond the last where there is no room


def _shards() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def _per_shard(function: Callable[..., Any], *trees: Any) -> Any:
    """`function` on each shard's rows of trees of (rows, ...), which no row leaves."""
    if _shards() == 1:
        return function(*trees)
    rows = PartitionSpec(("data", "fsdp"))
    return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names={"data", "fsdp"}, check_vma=False)(*trees)


# What happens on a shard, in its own numbers of rows and slots.


def _offer(count: int, samples: int, queue: _Queue, running: Array, taken: Array) -> tuple[_Offer, Array]:
    """The next `count` prompts with the free slots that they get, and how many have then left the queue."""
    prompts, rows, slots = queue.lengths.shape[0], queue.limits.shape[0], running.shape[0]
    fitting = jnp.minimum(jnp.sum(~running) // samples, prompts - taken[0])
    prompt = taken[0] + jnp.arange(count)
    row = (prompt[:, None] * samples + jnp.arange(samples)).reshape(-1)
    placed = jnp.arange(count * samples) < fitting * samples
    free_first = jnp.argsort(running, stable=True)[: count * samples]
    offer = _Offer(
        prompts=jnp.take(queue.prompts, prompt, axis=0, mode="clip"),
        lengths=jnp.take(queue.lengths, prompt, mode="clip"),
        keys=queue.keys[jnp.minimum(row, rows - 1)],
        limits=jnp.take(queue.limits, row, mode="clip"),
        answer=jnp.where(placed, row, rows),
        slot=jnp.where(placed, free_first, slots),
    )
    return offer, taken + jnp.minimum(count, fitting)


def _put(into: Any, rows: Array, new: Any) -> Any:
    """Trees of (n, ...) with rows of (m, ...) put in at `rows` (m,) from their beginning on; none beyond the last."""

    def put(whole: Array, part: Array) -> Array:
        return whole.at[(rows, *(slice(size) for size in part.shape[1:]))].set(part, mode="drop")

    return jax.tree.map(put, into, new)


def _flush(width: int, state: Any, block: Any) -> Any:
    """The answers and the caches with a block of tokens (slots, steps), and of keys and values, in each row's place."""
    answers, answer, began, drawn, ended, keys, values = state
    tokens, logprobs, new_keys, new_values = block
    column = began[:, None] + jnp.arange(tokens.shape[1])
    at = answer[:, None], column
    answers = _Answers(
        tokens=answers.tokens.at[at].set(tokens, mode="drop"),
        logprobs=answers.logprobs.at[at].set(logprobs, mode="drop"),
        lengths=answers.lengths.at[answer].set(drawn, mode="drop"),
        ended=answers.ended.at[answer].set(ended, mode="drop"),
    )
    place = width + began - 1
    update = jax.lax.dynamic_update_slice
    keys = tuple(
        jax.vmap(lambda x, new, at: update(x, new, (0, 0, at)))(x, new, place)
        for x, new in zip(keys, new_keys, strict=True)
    )
    values = tuple(
        jax.vmap(lambda x, new, at: update(x, new, (0, at, 0)))(x, new, place)
        for x, new in zip(values, new_values, strict=True)
    )
    return answers, keys, values


def _nothing_yet(config: TransformerConfig, queue: _Queue, slots: int, places: int, columns: int) -> _Refilling:
    """All slots free and all answers empty; `places` a cache row has, `columns` an answer."""
    rows, shards = queue.limits.shape[0], _shards()

    def zeros(*shape: int, dtype: Any = jnp.int32) -> Array:
        return constrain(jnp.zeros(shape, dtype), "batch", *[None] * (len(shape) - 1))

    zero, none = zeros(slots), zeros(slots, dtype=bool)
    cache = empty_cache(config, zeros(slots, places, dtype=bool), zeros(slots, places))
    keys, values = jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", None, None), (cache.keys, cache.values))
    return _Refilling(
        slots=_Slots(
            answer=zero + rows // shards,
            keys=jnp.broadcast_to(queue.keys[:1], (slots,)),
            prompt_lengths=zero + 1,
            limits=zero,
            token=zero,
            matched=zero,
            drawn=zero + 1,
            running=none,
            ended=none,
        ),
        keys=keys,
        values=values,
        answers=_Answers(
            tokens=zeros(rows, columns),
            logprobs=zeros(rows, columns, dtype=jnp.float32),
            lengths=zeros(rows),
            ended=zeros(rows, dtype=bool),
        ),
        taken=zeros(shards),
        steps=jnp.zeros((), jnp.int32),
        prefills=jnp.zeros((), jnp.int32),
    )


def _check(prompts: int, slots: int, admit: int, samples: int) -> None:
    shards = _shards()
    for name, number in {"prompts": prompts, "slots": slots, "admit": admit}.items():
        if number % shards or number < 1:
            raise UserError(f"{number} {name} do not divide over {shards} devices: make {name} a multiple of {shards}")
    if admit * samples > slots:
        raise UserError(
            f"a prefill of {admit} prompts with {samples} samples each does not fit in {slots} slots: "
            f"raise slots to {admit * samples}"
        )


@partial(jax.jit, static_argnames=("config", "sampling", "slots", "samples", "admit", "check_every"))
def generate_refilled(
    config: TransformerConfig,
    params: dict[str, Any],
    prompts: Array,
    lengths: Array,
    *,
    key: Array,
    sampling: Sampling,
    slots: int,
    row_ids: Array | None = None,
    adapters: dict[str, Any] | None = None,
    samples: int = 1,
    stop_table: Array | None = None,
    limits: Array | None = None,
    admit: int | None = None,
    check_every: int = 8,
) -> Refilled:
    """Samples answers to each prompt, `slots` rows at a time; the draws are those of `generate`.

    A row's place in its cache is its own, so at fixed `slots` and `admit` its answer is bitwise independent of the
    other rows, of the order of prompts and of when and where it is decoded.

    Args:
      slots: rows decoded at once (static).
      adapters: scaled adapters without a leading axis.
      admit: prompts that one prefill takes (static), as soon as there is room for all their rows (or for those of the
        last prompts); by default a quarter of what `slots` hold.
      others: as for `generate`.

    Returns:
      A `Refilled`, its rollout in the order of the prompts.

    Raises:
      UserError: prompts, slots or `admit` do not divide over the mesh's batch axes, or `admit` prompts do not fit in
        the slots.
    """
    (size, width), count, shards = prompts.shape, sampling.max_new_tokens, _shards()
    admit = admit or max(1, slots // (4 * samples * shards)) * shards
    _check(size, slots, admit, samples)
    if adapters is not None and jax.tree.leaves(adapters)[0].ndim == 4:
        raise UserError("adapters with a leading axis belong to places of a batch, which slots are not: use `generate`")
    rows, blocks = size * samples, max(1, -(-(count - 1) // check_every))
    run, logits_of = make_decoder(config, params, adapters)
    stops = stop_test(sampling, stop_table)
    room = jnp.full((rows,), count, jnp.int32) if limits is None else jnp.minimum(limits, count)
    queue = _Queue(
        prompts=prompts,
        lengths=lengths,
        keys=sample_keys(row_keys(key, jnp.arange(size) if row_ids is None else row_ids), samples),
        limits=room,
    )

    # --- admitting: the next prompts of the queue are prefilled and put into free slots ----------------------------
    def admissible(state: _Refilling) -> Array:
        free = jnp.sum(~state.slots.running.reshape(shards, -1), axis=1) // samples
        waiting = size // shards - state.taken
        return jnp.any((waiting > 0) & (free >= jnp.minimum(waiting, admit // shards)))

    def prefill(offer: _Offer) -> tuple[Array, Cache]:
        valid = jnp.arange(width) < offer.lengths[:, None]
        positions = jnp.broadcast_to(jnp.arange(width), offer.prompts.shape)
        cache = empty_cache(config, valid, positions)
        hidden, cache = run(offer.prompts, cache=cache, keep=(offer.lengths - 1)[:, None])
        return logits_of(hidden[:, 0]), cache

    def each(x: Array) -> Array:
        kept = [None] * (x.ndim - 1) if x.ndim < 4 else ["kv_heads", None, None]
        return x if samples == 1 else constrain(jnp.repeat(x, samples, axis=0), "batch", *kept)

    def admit_next(state: _Refilling) -> _Refilling:
        choose = partial(_offer, admit // shards, samples)
        offer, taken = _per_shard(choose, queue, state.slots.running, state.taken)
        logits, cache = prefill(offer)
        token, logprob = draw(each(logits), sampling, offer.keys, 0)
        stopped, matched = stops(token, jnp.zeros_like(token))
        ones, fits = jnp.ones_like(token), offer.answer < rows // shards
        newcomers = _Slots(
            answer=offer.answer,
            keys=offer.keys,
            prompt_lengths=each(offer.lengths),
            limits=offer.limits,
            token=token,
            matched=matched,
            drawn=ones,
            running=fits & ~stopped & (offer.limits > 1),
            ended=stopped,
        )
        held = state.slots, state.keys, state.values
        new = newcomers, *jax.tree.map(each, (cache.keys, cache.values))
        slots, keys, values = _per_shard(_put, held, offer.slot, new)
        first = _Answers(tokens=token[:, None], logprobs=logprob[:, None], lengths=ones, ended=stopped)
        answers = _per_shard(_put, state.answers, offer.answer, first)
        return _Refilling(slots, keys, values, answers, taken, state.steps, state.prefills + 1)

    # --- decoding: a block of steps writes keys and values of its own, and reads those before it ---------------------
    place, own = jnp.arange(width + blocks * check_every), jnp.arange(check_every)

    def decode_block(state: _Refilling) -> _Refilling:
        slots, began = state.slots, state.slots.drawn
        before, answers_from = (began - 1)[:, None], state.slots.prompt_lengths[:, None]
        past = Cache(
            keys=state.keys,
            values=state.values,
            valid=(place < answers_from) | ((place >= width) & (place < width + before)),
            positions=jnp.where(place < width, place, answers_from + place - width),
            index=jnp.zeros((), jnp.int32),
        )
        everywhere = jnp.ones((slots.token.shape[0], check_every), bool)
        block = empty_cache(config, everywhere, answers_from + before + own)

        def step(i: Array, carry: Any) -> Any:
            slots, block, tokens, logprobs = carry
            at = (slots.prompt_lengths + slots.drawn - 1)[:, None]
            hidden, block = run(slots.token[:, None], positions=at, cache=block.replace(past=past))
            token, logprob = draw(logits_of(hidden[:, 0]), sampling, slots.keys, slots.drawn)
            running = slots.running
            stopped, matched = stops(token, slots.matched)
            token, logprob = jnp.where(running, token, 0), jnp.where(running, logprob, 0.0)
            drawn = slots.drawn + running
            slots = slots.replace(
                token=token,
                matched=matched,
                drawn=drawn,
                running=running & ~stopped & (drawn < slots.limits),
                ended=slots.ended | (running & stopped),
            )
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
            logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], (0, i))
            return slots, block.replace(past=None), tokens, logprobs

        steps = jnp.where(jnp.any(slots.running), check_every, 0)
        empty = jnp.zeros(everywhere.shape, jnp.int32), jnp.zeros(everywhere.shape, jnp.float32)
        slots, block, *drawn = jax.lax.fori_loop(0, steps, step, (slots, block, *empty))
        whole = state.answers, slots.answer, began, slots.drawn, slots.ended, state.keys, state.values
        parts = *drawn, block.keys, block.values
        answers, keys, values = _per_shard(partial(_flush, width), whole, parts)
        slots = slots.replace(answer=jnp.where(slots.running, slots.answer, rows // shards))
        return _Refilling(slots, keys, values, answers, state.taken, state.steps + steps, state.prefills)

    # --- all of it -------------------------------------------------------------------------------------------------
    def unfinished(state: _Refilling) -> Array:
        return jnp.any(state.slots.running) | jnp.any(state.taken < size // shards)

    def advance(state: _Refilling) -> _Refilling:
        return decode_block(jax.lax.while_loop(admissible, admit_next, state))

    state = _nothing_yet(config, queue, slots, len(place), 1 + blocks * check_every)
    state = jax.lax.while_loop(unfinished, advance, state)
    answers = state.answers
    rollout = Rollout(
        prompts=each(prompts),
        prompt_lengths=each(lengths),
        tokens=answers.tokens[:, :count],
        lengths=answers.lengths,
        ended=answers.ended,
        logprobs=answers.logprobs[:, :count],
        sampling=sampling,
        dead=jnp.broadcast_to(dead_steps(answers.lengths, slots, state.steps), answers.lengths.shape),
    )
    return Refilled(rollout, state.steps, state.prefills)
