"""Beam search: the completions of a prompt that are most probable as wholes, as far as a beam of some width finds them.

Each step looks at every token behind every live beam of a prompt. Of the best `beams` of these candidates, those that
end go to the finished ones; the best `beams` of those that do not end live on. The beams of a prompt share its cache as
a group of samples does, and what each has of its own moves with it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.sampling import checks, loop, transforms
from alignax.sampling.choose import Chosen, Process
from alignax.sampling.generate import Samples, samples, start
from alignax.sampling.settings import Settings
from alignax.types import Array, Cache, Model, Params, Scalar


class Beams(NamedTuple):
    """What a beam search found; R = B * keep, the rows of a prompt contiguous and best first."""

    samples: Samples
    scores: Float[Array, " R"]  # sum of processed_logp / length^length_penalty, in nats; -inf: there was no such row


class _Search(NamedTuple):
    live: loop.State  # B * beams rows
    sums: Float[Array, "B beams"]  # the log-probability of each live beam; -inf: none
    pool: loop.State  # B * keep rows without a cache: the best that are finished
    scores: Float[Array, "B keep"]  # theirs, best first; -inf: none


def beam_search(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    beams: int,
    max_new_tokens: int,
    keep: int = 1,
    eos_ids: Any = (),
    length_penalty: Scalar = 1.0,
    process: tuple[Process, ...] = (),
    forbidden: Any = (),
    max_tokens: Scalar | None = None,
    stop: Any = (),
) -> Beams:
    """Finds the `keep` best completions of each prompt. Pure; compile it with the model and what has a star fixed:

        search = jax.jit(functools.partial(beam_search, model, beams=4, max_new_tokens=128, eos_ids=(2,)))
        found = search(params, prompts, lengths, length_penalty=0.6)

    A completion of n tokens, the EOS among them, scores `sum_t log p(y_t) / n^length_penalty`, where p is the model's
    distribution at temperature 1; forbidden ids are taken out of it, processes change it, and it is normalised again.
    See "Sequence to Sequence Learning with Neural Networks", Sutskever et al. (https://arxiv.org/abs/1409.3215),
    section 3.2, for the search.

    A prompt's search ends when no live beam can come among the kept. The bound: a sum only falls, so whatever grows out
    of a beam of n tokens with sum S scores at most S / m, m being the largest of l^length_penalty for l from n + 1 to
    max_tokens, which lies at one of the two ends. At `max_tokens` live beams count as finished, and are `truncated`.

    Beside transformers: this is `early_stopping="never"`, where the same candidates finish and live on, and the bound
    is as tight for length_penalty >= 0. Its `False` takes for m the present length instead, which misses longer
    completions when length_penalty > 0; its `True` ends as soon as `beams` completions are finished. It does not
    normalise again behind its processors. One beam is greedy decoding in both: it ends where it first finishes.

    Args:
      model, params, prompts, lengths: as `generate` takes them.
      beams: the live beams of each prompt (*).
      max_new_tokens: the room for each completion, EOS included (*).
      keep: completions returned for each prompt, at most `beams` (*).
      eos_ids, forbidden: tokens that end a completion, or are never chosen: ints, or an array [N] or [B, N], -1: none.
      length_penalty: 0 ranks by probability, 1 by the mean of log-probabilities; one number or [B], any sign.
      process: as `generate` takes them; the number of rows is B * beams (*).
      max_tokens: of each completion, 1 to max_new_tokens, one number or [B]; None: max_new_tokens.
      stop: sequences that end a completion, as `generate` takes them; an array is [K, L] or [B, K, L].

    Returns:
      `Beams`. `samples.logp` is what a trainer computes again at temperature 1, `samples.processed_logp` is what the
      scores are made of. Where fewer completions exist than are kept, the last rows are empty and score -inf.

    Raises:
      ValueError: for shapes that do not fit, numbers out of range, and rows longer than the model's context.
      TypeError: for ids or counts that are no integers.
    """
    checks.static(beams=beams, max_new_tokens=max_new_tokens, keep=keep)
    if keep > beams:
        raise ValueError(f"sampling: keep={keep}; expected at most beams={beams}")
    checks.prompts(prompts, lengths, None, group=beams)
    batch, width = prompts.shape
    checks.context(model, width, max_new_tokens)
    (power,) = checks.numbers(batch, length_penalty=length_penalty)
    settings = Settings.make(
        batch, max_new_tokens=max_new_tokens, max_tokens=max_tokens, eos_ids=eos_ids, forbidden=forbidden, stop=stop
    )
    settings = jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), settings)
    keys = jnp.zeros(batch * beams, jnp.uint32)  # nothing is drawn
    live = start(model, params, prompts, lengths, keys, settings, group=beams, slots=max_new_tokens)
    pool = _rows(live, jnp.arange(batch * beams).reshape(batch, beams)[:, :keep].reshape(-1))
    alone = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # all beams begin alike: one of them stands for all
    search = _Search(live, jnp.tile(alone, (batch, 1)), pool, jnp.full((batch, keep), -jnp.inf))
    params = loop.unrolled(model, params)

    def unfinished(search: _Search) -> Array:
        return ~jnp.all(search.sums == -jnp.inf)

    found = jax.lax.while_loop(unfinished, lambda search: _step(model, params, search, power, process), search)
    valid = jnp.repeat((lengths >= 1) & (lengths <= width), keep)
    return Beams(samples(found.pool, valid), jnp.where(valid, found.scores.reshape(-1), jnp.nan))


def _step(model: Model, params: Params, search: _Search, power: Array, process: tuple[Process, ...]) -> _Search:
    batch, beams = search.sums.shape
    logits, live = loop.feed(model, params, search.live)
    logp, processed = _logps(logits, live, process)
    size, ending = logits.shape[1], live.settings.eos_ids.shape[1] + live.settings.stop.shape[1]
    # No more than `ending` tokens of a beam end it, so that among so many candidates there are enough that do not.
    count = beams * min(1 + ending, size)
    before = search.sums.reshape(-1, 1)
    total = jnp.where(before == -jnp.inf, -jnp.inf, before + processed)
    sums, index = jax.lax.top_k(total.reshape(batch, beams * size), count)
    source = (index // size + jnp.arange(batch)[:, None] * beams).reshape(-1)
    token = (index % size).reshape(-1)
    grown = loop.append(_rows(live, source), Chosen(token, logp[source, token], processed[source, token]))
    over = grown.done.reshape(batch, count)

    ends = over & (jnp.arange(count) < beams)[None]
    scores = jnp.where(ends, sums / _scale(grown.ends - grown.starts, power, sums), -jnp.inf)
    scores, pool = _best(jnp.concatenate([search.scores, scores], axis=1), search.pool, grown)

    sums, chosen = jax.lax.top_k(jnp.where(over, -jnp.inf, sums), beams)
    chosen = (chosen + jnp.arange(batch)[:, None] * count).reshape(-1)
    kept = _rows(grown, chosen)._replace(cache=_reordered(live.cache, source[chosen], batch))
    sums = jnp.where(_may_enter(kept, sums, scores, power), sums, -jnp.inf)
    return _Search(kept, sums, pool, scores)


def _logps(logits: Array, live: loop.State, process: tuple[Process, ...]) -> tuple[Array, Array]:
    """Log-probabilities [R, V]: the model's own, and those behind forbidden ids and processes."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32))
    if not process and not live.settings.forbidden.shape[1]:
        return logp, logp
    bent = transforms.forbid(logits, live.settings.forbidden)
    for function in process:
        bent = function(bent, live.tokens, live.ends)
    # a row that may take no token at all is at its end, and no NaN
    return logp, jnp.where(bent == -jnp.inf, -jnp.inf, jax.nn.log_softmax(bent.astype(jnp.float32)))


def _rows(state: loop.State, index: Int[Array, " N"]) -> loop.State:
    """Some rows of a state, without their cache."""
    return jax.tree.map(lambda leaf: leaf[index], state._replace(cache=()))


def _reordered(cache: Cache, source: Int[Array, " R"], batch: int) -> Cache:
    """The cache of rows that go on from others of their prompt; what leads with B they share."""
    if len(source) == batch:
        return cache  # one beam goes on from itself
    return jax.tree.map(lambda leaf: leaf if leaf.shape[0] == batch else leaf[source], cache)


def _best(
    scores: Float[Array, "B N"], pool: loop.State, grown: loop.State
) -> tuple[Float[Array, "B keep"], loop.State]:
    """The pool of each prompt after what has grown beside it; the older of equals first."""
    batch = scores.shape[0]
    keep = len(pool.ends) // batch
    scores, index = jax.lax.top_k(scores, keep)

    def pick(old: Array, new: Array) -> Array:
        apart = [leaf.reshape(batch, len(leaf) // batch, *leaf.shape[1:]) for leaf in (old, new)]
        both = jnp.concatenate(apart, axis=1)
        return both[jnp.arange(batch)[:, None], index].reshape(old.shape)

    return scores, jax.tree.map(pick, pool, grown)


def _may_enter(
    live: loop.State, sums: Float[Array, "B beams"], scores: Float[Array, "B keep"], power: Float[Array, " B"]
) -> Bool[Array, "B 1"]:
    """Whether a live beam of a prompt may still score more than the worst that is kept; NaN may, to be seen."""
    following = _scale(live.ends - live.starts + 1, power, sums)
    bound = sums / jnp.maximum(following, _scale(live.settings.max_tokens, power, sums))
    may = ~(jnp.max(bound, axis=1) <= scores[:, -1])
    return (may if sums.shape[1] > 1 else may & (scores[:, -1] == -jnp.inf))[:, None]


def _scale(length: Int[Array, " N"], power: Float[Array, " B"], like: Float[Array, "B M"]) -> Float[Array, "B M"]:
    """length^power, shaped like another array."""
    return length.reshape(like.shape).astype(jnp.float32) ** power[:, None]
