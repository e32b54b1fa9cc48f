"""Drafts: where the proposals of speculative decoding come from.

A draft may propose anything: `speculative` accepts or replaces its tokens such that the output has the distribution of
the model alone. A draft only decides how often it is right, and says what it drew its tokens from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.sampling import checks, draw, loop
from alignax.types import Array, Cache, Model, Params

# (logits [R, V], tokens [R, T], columns [R]) -> probabilities [R, V] after penalties, processes and filters
Distribution = Callable[[Array, Array, Array], Array]


class Proposal(NamedTuple):
    """The next K tokens of each row, as a draft would have them."""

    tokens: Int[Array, "R K"]  # ids of the model's vocabulary; -1 is no proposal, where q is None
    q: Float[Array, "R K V"] | None  # the probabilities that each was drawn from; None: they are no draws
    carry: Any  # for the next round


class Draft(NamedTuple):
    """A source of proposals as two pure functions.

    init: `(draft_params, prompts [B, P], lengths [B], *, group, slots) -> carry`, once, for rows of up to `slots` new
      tokens. The carry is a pytree of arrays.
    propose: `(carry, rows, count, distribution) -> Proposal` of K = count tokens for the columns from `rows.ends` on.
      rows: the `loop.State` without its cache; its keys are the draft's own, for `draw.uniforms(rows.keys, columns)`.
      A number that served one column must not serve another, or a round depends on what the one before has kept.
      distribution: logits to probabilities as the model's own are processed. `q` may be any other distribution, as
      long as each token was drawn from it given the tokens before it. Proposals for columns behind the row are ignored.
    """

    init: Callable[..., Any]
    propose: Callable[[Any, loop.State, int, Distribution], Proposal]


def draft_model(model: Model) -> Draft:
    """Proposals of a smaller model with the same vocabulary, drawn under the same settings from a cache of its own.

    A round feeds K + 1 tokens in K passes: the first takes two, since when all proposals were accepted the last of
    them has not been fed yet. `init` raises ValueError without parameters or where rows do not fit the draft's context.
    """

    def init(
        params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], *, group: int, slots: int
    ) -> tuple[Params, Cache]:
        if params is None:
            raise ValueError("sampling: draft_params=None; expected the parameters of the draft model")
        checks.context(model, prompts.shape[1], slots)
        cache = loop.prefill(model, params, prompts, lengths, group=group, slots=slots)
        return loop.unrolled(model, params), cache

    def propose(carry: tuple[Params, Cache], rows: loop.State, count: int, distribution: Distribution) -> Proposal:
        params, cache = carry

        def pick(tokens, states, offset):
            columns = jnp.minimum(rows.ends + offset, tokens.shape[1])
            q = distribution(model.logits(params, states[:, -1]), tokens, columns)
            token = pick_from(q, draw.uniforms(rows.keys, columns))
            return tokens.at[jnp.arange(len(token)), columns].set(token, mode="drop"), (token, q)

        def step(carry, offset):
            tokens, cache = carry
            states, cache = read(model, params, tokens, (rows.ends + offset - 1)[:, None], cache)
            tokens, picked = pick(tokens, states, offset)
            return (tokens, cache), picked

        last_two = rows.ends[:, None] - jnp.array([[2, 1]])
        states, cache = read(model, params, rows.tokens, jnp.maximum(last_two, rows.starts[:, None] - 1), cache)
        tokens, first = pick(rows.tokens, states, 0)
        (_, cache), rest = jax.lax.scan(step, (tokens, cache), jnp.arange(1, count))
        tokens, q = (jnp.concatenate([a[:, None], b.swapaxes(0, 1)], axis=1) for a, b in zip(first, rest))
        return Proposal(tokens, q, (params, cache))

    return Draft(init, propose)


def ngram(longest: int) -> Draft:
    """Proposals that copy what followed the last tokens of the row where they, or most of them, occurred before.

    Of the earlier places in prompt and completion that agree in the most last tokens, up to `longest`, the latest one
    counts; without any the last token is repeated. What would run past the row's end goes on in its period.

    See "Inference with Reference: Lossless Acceleration of Large Language Models", Yang et al.
    (https://arxiv.org/abs/2304.04487), and "Prompt Lookup Decoding", Saxena
    (https://github.com/apoorvumang/prompt-lookup-decoding).

    Raises:
      ValueError: for a length below 1. TypeError: for one that is no int.
    """
    checks.static(longest=longest)

    def init(params: Params, prompts: Array, lengths: Array, *, group: int, slots: int) -> tuple[()]:
        del params, prompts, lengths, group, slots
        return ()

    def propose(carry: tuple[()], rows: loop.State, count: int, distribution: Distribution) -> Proposal:
        del distribution
        tokens, ends = rows.tokens, rows.ends[:, None]
        columns = jnp.arange(tokens.shape[1])[None]
        agrees, score = jnp.ones(tokens.shape, bool), jnp.zeros(tokens.shape, jnp.int32)
        for back in range(1, longest + 1):  # a column counts the tokens before it that are those before the end
            wanted = jnp.take_along_axis(tokens, jnp.maximum(ends - back, 0), axis=1)
            agrees &= (jnp.roll(tokens, back, axis=1) == wanted) & (columns >= back)
            score += agrees
        latest = jnp.where(columns < ends, score * tokens.shape[1] + columns, -1)
        source = jnp.argmax(latest, axis=1, keepdims=True)
        copied = source + jnp.arange(count)[None] % (ends - source)
        return Proposal(jnp.take_along_axis(tokens, copied, axis=1), None, carry)

    return Draft(init, propose)


def read(
    model: Model, params: Params, tokens: Int[Array, "R T"], columns: Int[Array, "R C"], cache: Cache
) -> tuple[Float[Array, "R C D"], Cache]:
    """Runs the tokens in these columns of each row; their states, and the cache with their slots filled.

    Columns behind T repeat the last: a position outside the model's context could make NaN, and a NaN in a slot spoils
    its row even where no token sees it.
    """
    columns = jnp.minimum(columns, tokens.shape[1] - 1)
    fed = jnp.take_along_axis(tokens, columns, axis=1)
    hidden = model.hidden(params, fed, jnp.ones_like(fed), positions=columns, cache=cache)
    return hidden.states, hidden.cache


def pick_from(weight: Float[Array, "R V"], uniform: Float[Array, "R 2"]) -> Int[Array, " R"]:
    """A token of each row with a probability in proportion to its weight, see `draw.categorical`."""
    return draw.categorical(-jnp.log(weight), jnp.full(len(weight), jnp.inf), uniform)[0]
