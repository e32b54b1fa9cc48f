"""Speculative decoding: a draft proposes tokens, one pass of the model judges them all, the distribution is unchanged.

See "Fast Inference from Transformers via Speculative Decoding", Leviathan et al. (https://arxiv.org/abs/2211.17192),
and "Accelerating Large Language Model Decoding with Speculative Sampling", Chen et al.
(https://arxiv.org/abs/2302.01318). A proposal x stays with probability min(1, p(x) / q(x)); the first that does not is
replaced by a draw from max(p - q, 0), normalised; behind K that stay one more is drawn from p. Here p is what
`generate` draws from, after penalties, processes, temperature and filters, and a greedy row has all mass on one token.

Numbers belong to (key, row id, column), in a stream each for the draft, the verdicts and the draws. Columns behind the
first rejection use theirs again in the next round, which is sound: nothing that is kept has depended on them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.sampling import checks, choose, draw, loop, transforms
from alignax.sampling.choose import Chosen, Process
from alignax.sampling.drafts import Distribution, Draft, Proposal, pick_from, read
from alignax.sampling.generate import Samples, samples, start
from alignax.sampling.settings import Settings
from alignax.types import Array, Model, Params

_OF_DRAFT, _OF_VERDICTS = 2**31 - 1, 2**31 - 2  # folded into a row's key; no column reaches them


class Speculation(NamedTuple):
    """What was spent on each row: `lengths / rounds` tokens per pass, and the part `accepted / proposed` was right."""

    rounds: Int[Array, " R"]  # passes of the model while the row was not done
    proposed: Int[Array, " R"]  # tokens of the draft that the row had room for
    accepted: Int[Array, " R"]  # of these, those that are in the row


def speculate(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    draft: Draft,
    draft_params: Params = None,
    draft_tokens: int = 4,
    max_new_tokens: int,
    row_ids: Int[Array, " R"] | None = None,
    group: int = 1,
    process: tuple[Process, ...] = (),
    **settings: Any,
) -> tuple[Samples, Speculation]:
    """`generate` in fewer passes of the model: samples of the same distribution, and greedy rows that are the same.

        draft = sampling.draft_model(small)  # or sampling.ngram(3)
        sample = jax.jit(functools.partial(speculate, model, draft=draft, max_new_tokens=128, eos_ids=(2,)))
        samples, spent = sample(params, prompts, lengths, key, draft_params=small_params, temperature=0.7)

    Each round is one pass of K + 1 tokens of every row. It pays where such a pass costs little more than one of a
    single token: small batches of large models. Rows advance by 1 to K + 1 tokens; a row is the same in any batch,
    order or group of equal shapes, but does not go on as it would have when its first tokens come back in the prompt,
    since the rounds begin elsewhere. The model's cache must forget what is overwritten: slots addressed by position.

    Args:
      draft: `draft_model(model)`, `ngram(n)` or another `Draft`, fixed when compiled.
      draft_params: what `draft.init` takes first; None for `ngram`.
      draft_tokens: K, the proposals of a round, fixed when compiled.
      settings: temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, eos_ids, forbidden and stop.
      All others, and these settings, are those of `generate`; for a proposal, `process` sees the row with the
      proposals before it, under `vmap`.

    Returns:
      `Samples` as `generate` has them, and what they took as `Speculation`.

    Raises:
      ValueError: as `generate` does, for a draft of another vocabulary, and for missing draft_params.
      TypeError: as `generate` does, and for a draft that is none.
    """
    checks.static(max_new_tokens=max_new_tokens, group=group, draft_tokens=draft_tokens)
    checks.prompts(prompts, lengths, row_ids, group=group)
    if not isinstance(draft, Draft):
        raise TypeError(f"sampling: draft of type {type(draft).__name__}; expected a Draft, such as draft_model(model)")
    batch, width = prompts.shape
    checks.context(model, width, max_new_tokens)
    settled = Settings.make(batch * group, max_new_tokens=max_new_tokens, **settings)
    row_ids = jnp.arange(batch * group, dtype=jnp.int32) if row_ids is None else row_ids
    keys = draw.row_keys(key, row_ids)
    state = start(model, params, prompts, lengths, keys, settled, group=group, slots=max_new_tokens)
    valid = (lengths >= 1) & (lengths <= width)
    lengths = jnp.clip(lengths.astype(jnp.int32), 1, width)
    carry = draft.init(draft_params, prompts, lengths, group=group, slots=max_new_tokens)
    params, nothing = loop.unrolled(model, params), jnp.zeros(batch * group, jnp.int32)

    def body(carried):
        state, carry, spent = carried
        proposal, state, kept = _round(model, params, draft, state, carry, draft_tokens, process)
        return state, proposal.carry, Speculation(*map(jnp.add, spent, kept))

    first = state, carry, Speculation(nothing, nothing, nothing)
    state, _, spent = jax.lax.while_loop(lambda carried: ~jnp.all(carried[0].done), body, first)
    return samples(state, jnp.repeat(valid, group)), spent


def _round(
    model: Model, params: Params, draft: Draft, state: loop.State, carry: Any, count: int, process: tuple[Process, ...]
) -> tuple[Proposal, loop.State, Speculation]:
    """Proposals for every row, the row behind the tokens that stay, and what was spent on it."""
    tokens, ends, settings = state.tokens, state.ends, state.settings
    columns = jnp.minimum(ends[:, None] + jnp.arange(count + 1)[None], tokens.shape[1])
    distribution = functools.partial(_probabilities, settings=settings, process=process)
    rows = state._replace(cache=None, keys=_stream(state.keys, _OF_DRAFT))
    proposal = draft.propose(carry, rows, count, distribution)
    _check(proposal, len(ends), count)
    tokens = tokens.at[jnp.arange(len(ends))[:, None], columns[:, :-1]].set(proposal.tokens, mode="drop")
    states, cache = read(model, params, tokens, ends[:, None] - 1 + jnp.arange(count + 1)[None], state.cache)
    logits = model.logits(params, states)
    p = _each(distribution, logits, tokens, columns)
    kept = _verdicts(p, proposal, state.keys, columns)
    chosen = _chosen(logits, p, proposal, kept, columns, state)
    after = _commit(state._replace(cache=cache), chosen, kept)
    room = settings.max_tokens - (ends - state.starts)
    proposed = jnp.where(state.done, 0, jnp.minimum(count, room))
    spent = Speculation((~state.done).astype(jnp.int32), proposed, jnp.minimum(kept, after.ends - ends))
    return proposal, after, spent


def _check(proposal: Proposal, rows: int, count: int) -> None:
    if proposal.tokens.shape != (rows, count):
        raise ValueError(f"sampling: the draft's tokens of shape {proposal.tokens.shape}; expected ({rows}, {count})")


def _each(
    distribution: Distribution, logits: Float[Array, "R N V"], tokens: Int[Array, "R T"], columns: Int[Array, "R N"]
) -> Float[Array, "R N V"]:
    """The distribution of each column, which sees the row up to that column."""

    def one(logits, columns):
        before = jnp.arange(tokens.shape[1])[None] < columns[:, None]
        return distribution(logits, jnp.where(before, tokens, 0), columns)

    return jax.vmap(one, 1, 1)(logits, columns)  # maps no setting, so what is off in all rows stays off


def _verdicts(
    p: Float[Array, "R N V"], proposal: Proposal, keys: Array, columns: Int[Array, "R N"]
) -> Int[Array, " R"]:
    """How many proposals stay: those before the first with u q(x) >= p(x), or that is no token."""
    if proposal.q is not None and proposal.q.shape != (expected := (*proposal.tokens.shape, p.shape[-1])):
        raise ValueError(
            f"sampling: the draft's q of shape {proposal.q.shape}; expected {expected}: rows, proposals and the "
            "tokens of the model's vocabulary"
        )
    number = jax.vmap(draw.uniforms, (None, 1), 1)(_stream(keys, _OF_VERDICTS), columns[:, :-1])[..., 0]
    under_q = 1.0 if proposal.q is None else _at(proposal.q, proposal.tokens)
    stays = (number * under_q < _at(p[:, :-1], proposal.tokens)) & (proposal.tokens >= 0)  # -1 would be the last
    return jnp.sum(jnp.cumprod(stays.astype(jnp.int32), axis=1), axis=1)


def _chosen(
    logits: Float[Array, "R N V"],
    p: Float[Array, "R N V"],
    proposal: Proposal,
    kept: Int[Array, " R"],
    columns: Int[Array, "R N"],
    state: loop.State,
) -> Chosen:
    """Tokens [R, N] with their log-probabilities: proposals, and from `kept` on the draw that replaces the next."""
    final = jnp.take_along_axis(columns, kept[:, None], axis=1)[:, 0]
    drawn = pick_from(_left(p, proposal, kept), draw.uniforms(state.keys, final))
    proposed = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(jnp.arange(p.shape[1])[None] < kept[:, None], proposed, drawn[:, None])

    def own(logits, token):
        gap = transforms.gaps(logits, choose.heat(state.settings))
        return choose.logp_of(gap, token, jnp.sum(jnp.exp(-gap), axis=-1))

    return Chosen(tokens, jax.vmap(own, 1, 1)(logits, tokens), jnp.log(_at(p, tokens)))


def _left(p: Float[Array, "R N V"], proposal: Proposal, kept: Int[Array, " R"]) -> Float[Array, "R V"]:
    """max(p - q, 0) at the first proposal that does not stay, p behind the last, and where rounding leaves none."""
    count, size = proposal.tokens.shape[1], p.shape[2]
    index = jnp.minimum(kept, count - 1)[:, None]
    if proposal.q is None:
        q = jax.nn.one_hot(jnp.take_along_axis(proposal.tokens, index, axis=1)[:, 0], size)
    else:
        q = jnp.take_along_axis(proposal.q, index[..., None], axis=1)[:, 0]
    p = jnp.take_along_axis(p, kept[:, None, None], axis=1)[:, 0]
    left = jnp.maximum(p - jnp.where(kept[:, None] < count, q, 0.0), 0.0)
    return jnp.where(jnp.sum(left, axis=-1, keepdims=True) > 0, left, p)


def _commit(state: loop.State, chosen: Chosen, kept: Int[Array, " R"]) -> loop.State:
    """Appends the first kept + 1 tokens, one after the other: what ends a row ends it here as in `generate`."""

    def step(state, one):
        index, chosen = one
        waits = index > kept
        after = loop.append(state._replace(stopped=state.stopped | waits), chosen)
        return after._replace(stopped=jnp.where(waits, state.stopped, after.stopped)), None

    columns = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), chosen)
    after, _ = jax.lax.scan(step, state._replace(cache=None), (jnp.arange(len(columns.token)), columns))
    return after._replace(cache=state.cache)


def _probabilities(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R T"],
    columns: Int[Array, " R"],
    *,
    settings: Settings,
    process: tuple[Process, ...],
) -> Float[Array, "R V"]:
    """What `choose` draws from as probabilities; all mass on the first of the best in greedy rows."""
    gap, limit = choose.bend(logits, tokens, columns, settings=settings, process=process)
    weight = jnp.where(gap <= limit[:, None], jnp.exp(-gap), 0.0)
    first = jnp.arange(gap.shape[1])[None] == jnp.argmin(gap, axis=1, keepdims=True)
    weight = jnp.where((settings.temperature[:, None] == 0) & ~first, 0.0, weight)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def _at(x: Float[Array, "R N V"], tokens: Int[Array, "R N"]) -> Float[Array, "R N"]:
    return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]


def _stream(keys: Array, constant: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, constant)
