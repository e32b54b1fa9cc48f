"""Completions of a batch of prompts: the function callers use, and the rows it returns."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.sampling import checks, draw, loop
from alignax.sampling.choose import Process, Settings, choose
from alignax.types import Array, Model, Params, Scalar


class Samples(NamedTuple):
    """Training rows as they are, `[prompt][completion][padding]` from column 0; T = P + max_new_tokens, R = B * group.

    Rows of one prompt are contiguous: `x.reshape(B, group, ...)`.
    """

    tokens: Int[Array, "R T"]  # 0 in the padding
    segments: Int[Array, "R T"]  # 1 for prompt and completion, 0 for padding
    mask: Bool[Array, "R T"]  # the completion, with the EOS that ended it
    logp: Float[Array, "R T"]  # of the completion's tokens under the temperature alone, float32; 0 off the mask
    lengths: Int[Array, " R"]  # tokens of the completion, with its EOS
    truncated: Bool[Array, " R"]  # no EOS: the row ran out of max_new_tokens


def generate(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    key: Array,
    *,
    max_new_tokens: int,
    row_ids: Int[Array, " R"] | None = None,
    group: int = 1,
    eos_ids: tuple[int, ...] = (),
    temperature: Scalar = 1.0,
    top_k: Scalar = 0,
    top_p: Scalar = 1.0,
    min_p: Scalar = 0.0,
    process: tuple[Process, ...] = (),
) -> Samples:
    """Samples `group` completions of each prompt. Pure; compile it with the model and what has a star below fixed:

        sample = jax.jit(functools.partial(generate, model, max_new_tokens=128, group=8, eos_ids=(2,)))
        samples = sample(params, prompts, lengths, key, temperature=0.7)

    Each prompt is prefilled once, then one loop on the device runs until every row is done. Filters apply in the order
    top_k, top_p, min_p, each to what the one before left, after the temperature; see `transforms` for ties. No value
    of temperature, top_k, top_p or min_p compiles anything anew, and each may be one number or an array `[R]`.

    Random numbers belong to (key, row id, column): with equal shapes a row is the same in any batch, order or group,
    and goes on as it would have when its first tokens come back as part of the prompt.

    Args:
      model: any `Model` (*).
      params: its parameters.
      prompts: token ids from column 0; what lies at or behind `lengths` is ignored.
      lengths: the tokens of each prompt, 1 to P. Where `jit` hides one that is not, its row gets an empty mask and a
        logp of NaN.
      key: is consumed.
      max_new_tokens: of each completion, EOS included (*).
      row_ids: the identity of each row's randomness; 0 to R - 1 when None. Give every row of a run an id of its own
        where one key serves several calls.
      group: completions of each prompt (*).
      eos_ids: tokens that end a completion, none when empty; a prompt may hold them (*).
      temperature: divides the logits; 0 takes the most likely token (the first of equals) and reports its logp at 1.
      top_k: keeps the k most likely tokens and those that tie with the last of them; 0 is off.
      top_p: keeps the fewest most likely tokens that hold this probability, in (0, 1]; 1 is off.
      min_p: keeps tokens at least this many times as likely as the best one, in [0, 1]; 0 is off.
      process: functions `(logits [R, V], tokens [R, T], columns [R]) -> logits [R, V]`, applied in order before the
        temperature; tokens are the rows so far, 0 from `columns` on. They do not enter `logp` (*).

    Returns:
      `Samples` with R = B * group rows.

    Raises:
      ValueError: for shapes that do not fit, numbers out of range, and rows longer than the model's context.
      TypeError: for ids or counts that are no integers.
    """
    checks.static(max_new_tokens=max_new_tokens, group=group, eos_ids=eos_ids)
    checks.prompts(prompts, lengths, row_ids, group=group)
    batch, width = prompts.shape
    checks.context(model, width, max_new_tokens)
    rows, size = batch * group, width + max_new_tokens
    settings = Settings(*checks.settings(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    row_ids = jnp.arange(rows, dtype=jnp.int32) if row_ids is None else row_ids
    valid = (lengths >= 1) & (lengths <= width)
    lengths = jnp.clip(lengths.astype(jnp.int32), 1, width)
    columns = jnp.arange(size, dtype=jnp.int32)[None]

    cache = loop.prefill(model, params, prompts, lengths, size=size)
    tokens = jnp.where(columns < lengths[:, None], jnp.pad(prompts.astype(jnp.int32), ((0, 0), (0, size - width))), 0)
    cache, tokens, starts = _repeat((cache, tokens, lengths), group)
    logp, done = jnp.zeros((rows, size), jnp.float32), jnp.zeros(rows, bool)
    method = functools.partial(choose, keys=draw.row_keys(key, row_ids), settings=settings, process=process)
    state = loop.State(cache, tokens, logp, starts, done)
    state = loop.decode(model, params, state, method, max_new_tokens=max_new_tokens, eos_ids=eos_ids)

    filled, valid = columns < state.ends[:, None], jnp.repeat(valid, group)
    return Samples(
        tokens=state.tokens,
        segments=filled.astype(jnp.int32),
        mask=filled & (columns >= starts[:, None]) & valid[:, None],
        logp=jnp.where(valid[:, None], state.logp, jnp.nan),
        lengths=state.ends - starts,
        truncated=~state.done,
    )


def _repeat(tree: Any, group: int) -> Any:
    """Every row `group` times, beside itself."""
    return tree if group == 1 else jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), tree)
