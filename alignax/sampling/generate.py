"""Completions of a batch of prompts: the function callers use, and the rows it returns."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.sampling import checks, draw, loop
from alignax.sampling.choose import Process
from alignax.sampling.settings import Settings
from alignax.types import Array, Model, Params, Scalar


class Samples(NamedTuple):
    """Training rows as they are, `[prompt][completion][padding]` from column 0; T = P + max_new_tokens, R = B * group.

    Rows of one prompt are contiguous: `x.reshape(B, group, ...)`. The two log-probabilities differ by what bends the
    distribution: filters, penalties, processes. `logp` is what a trainer computes again, and the one for ratios.
    """

    tokens: Int[Array, "R T"]  # 0 in the padding
    segments: Int[Array, "R T"]  # 1 for prompt and completion, 0 for padding
    mask: Bool[Array, "R T"]  # the completion, with the EOS or stop sequence that ended it
    logp: Float[Array, "R T"]  # of the completion's tokens under the temperature alone, float32; 0 off the mask
    lengths: Int[Array, " R"]  # tokens of the completion, with its EOS
    truncated: Bool[Array, " R"]  # no EOS and no stop sequence: the row ran out of tokens
    processed_logp: Float[Array, "R T"] | None = None  # under the distribution that they were drawn from


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
    eos_ids: Any = (),
    temperature: Scalar = 1.0,
    top_k: Scalar = 0,
    top_p: Scalar = 1.0,
    min_p: Scalar = 0.0,
    repetition_penalty: Scalar = 1.0,
    max_tokens: Scalar | None = None,
    forbidden: Any = (),
    stop: Any = (),
    process: tuple[Process, ...] = (),
) -> Samples:
    """Samples `group` completions of each prompt. Pure; compile it with the model and what has a star below fixed:

        sample = jax.jit(functools.partial(generate, model, max_new_tokens=128, group=8, eos_ids=(2,)))
        samples = sample(params, prompts, lengths, key, temperature=0.7)

    Each prompt is prefilled once and its keys and values are stored and read once, however large its group. Then one
    loop on the device runs until every row is done. What bends the distribution applies in the order repetition
    penalty, forbidden ids, processes, temperature, top_k, top_p, min_p, each filter to what the one before left; see
    `transforms` for ties. No value of a setting compiles anything anew, and each may be one number or an array `[R]`.

    Random numbers belong to (key, row id, column): with equal shapes a row is the same in any batch, order or group,
    and goes on as it would have when its first tokens come back as part of the prompt.

    Args:
      model: any `Model` (*).
      params: its parameters.
      prompts: token ids from column 0; what lies at or behind `lengths` is ignored.
      lengths: the tokens of each prompt, 1 to P. Where `jit` hides one that is not, its row gets an empty mask and a
        logp of NaN.
      key: is consumed.
      max_new_tokens: the room for each completion, EOS included (*).
      row_ids: the identity of each row's randomness; 0 to R - 1 when None. Give every row of a run an id of its own
        where one key serves several calls.
      group: completions of each prompt (*).
      eos_ids: tokens that end a completion, none when empty; a prompt may hold them. Ints for all rows, or an array
        [E] or [R, E] with -1 for none.
      temperature: divides the logits; 0 takes the most likely token (the first of equals) and reports its logp at 1.
      top_k: keeps the k most likely tokens and those that tie with the last of them; 0 is off.
      top_p: keeps the fewest most likely tokens that hold this probability, in (0, 1]; 1 is off.
      min_p: keeps tokens at least this many times as likely as the best one, in [0, 1]; 0 is off.
      repetition_penalty: makes tokens that the row holds less likely, prompt included; 1 is off.
      max_tokens: of each completion, 1 to max_new_tokens; None: max_new_tokens.
      forbidden: tokens that are never chosen, given as `eos_ids` are. A row that may choose none at all gets token 0
        and a processed_logp of NaN.
      stop: sequences of ids that end a completion and stay in it: `((13, 13), (7,))` for all rows, or an array [K, L]
        or [R, K, L] with -1 before each sequence.
      process: functions `(logits [R, V], tokens [R, T], columns [R]) -> logits [R, V]`, applied in order before the
        temperature; tokens are the rows so far, 0 from `columns` on. They do not enter `logp` (*).

    Returns:
      `Samples` with R = B * group rows.

    Raises:
      ValueError: for shapes that do not fit, numbers out of range, and rows longer than the model's context.
      TypeError: for ids or counts that are no integers.
    """
    checks.static(max_new_tokens=max_new_tokens, group=group)
    checks.prompts(prompts, lengths, row_ids, group=group)
    batch, width = prompts.shape
    checks.context(model, width, max_new_tokens)
    checks.vocabulary(model, prompts, lengths)
    settings = Settings.make(
        batch * group,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        max_tokens=max_tokens,
        eos_ids=eos_ids,
        forbidden=forbidden,
        stop=stop,
    )
    row_ids = jnp.arange(batch * group, dtype=jnp.int32) if row_ids is None else row_ids
    keys = draw.row_keys(key, row_ids)
    rooms, sizes = loop.rooms(model, max_new_tokens), {"group": group, "slots": max_new_tokens}
    state = start(model, params, prompts, lengths, keys, settings, room=rooms[0], **sizes)
    state = loop.decode(model, loop.unrolled(model, params), state, steps=max_new_tokens, rooms=rooms, process=process)
    return samples(state, jnp.repeat((lengths >= 1) & (lengths <= width), group))


def start(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Array,
    settings: Settings,
    *,
    group: int,
    slots: int,
    width: int | None = None,
    room: int | None = None,
) -> loop.State:
    """Rows that hold their prompts and nothing else, with room for prompts of `width` (None: P) and `slots` tokens.

    room: the slots that the cache has for a start, where it can grow; None: all.
    """
    rows, given = len(settings.temperature), prompts.shape[1]
    width = given if width is None else width
    lengths = jnp.clip(lengths.astype(jnp.int32), 1, given)
    cache = loop.prefill(model, params, prompts, lengths, group=group, slots=room or slots, width=width)
    kept = jnp.where(jnp.arange(given)[None] < lengths[:, None], prompts.astype(jnp.int32), 0)
    tokens = jnp.repeat(jnp.pad(kept, ((0, 0), (0, width + slots - given))), group, axis=0)
    starts = jnp.repeat(lengths, group)
    logp = jnp.zeros((rows, width + slots), jnp.float32)
    return loop.State(cache, tokens, logp, logp, starts, starts, jnp.zeros(rows, bool), keys, settings)


def samples(state: loop.State, valid: Bool[Array, " R"]) -> Samples:
    """The rows of a state; those that are not valid get an empty mask and a logp of NaN."""
    columns = jnp.arange(state.tokens.shape[1])[None]
    filled = columns < state.ends[:, None]
    return Samples(
        tokens=state.tokens,
        segments=filled.astype(jnp.int32),
        mask=filled & (columns >= state.starts[:, None]) & valid[:, None],
        logp=jnp.where(valid[:, None], state.logp, jnp.nan),
        lengths=state.ends - state.starts,
        truncated=~state.stopped,
        processed_logp=jnp.where(valid[:, None], state.processed_logp, jnp.nan),
    )
