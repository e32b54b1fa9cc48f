"""Which rows stand behind a number: found, and written out, only when there is something to say about it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import sampling, train
from alignax.data import text
from alignax.io import hf
from alignax.logprobs import last_score, token_logprobs
from alignax.types import Model, Params

_SHOWN = 60  # letters of a prompt or completion in a message


class Rows(NamedTuple):
    """The rows behind a step's metrics.

    names: where each comes from. numbers: by name, one for each row. What `signs` look for are "reward", "length",
    "logp" (the mean log-probability of a token), "gap" (the largest difference of one to when it was sampled) and
    "spread" (the standard deviation of the group's rewards).
    """

    names: Sequence[str]
    prompts: Sequence[str]
    completions: Sequence[str]
    numbers: Mapping[str, Any]


def worst(rows: Rows, name: str, largest: bool = True, *, count: int = 3) -> str:
    """The rows that stand out by a number, a line for each; before them those that have one which is not finite.

    Where rows do not have the number, only the latter; "" for none.
    """
    numbers = {key: np.asarray(found, np.float64) for key, found in rows.numbers.items()}
    broken = np.zeros(len(rows.names), bool)
    for found in numbers.values():
        broken |= ~np.isfinite(found)
    by = numbers.get(name, np.zeros(len(broken)))
    order = np.lexsort((-by if largest else by, ~broken))
    chosen = [i for i in order if broken[i] or name in numbers][:count]
    return "".join(f"\n  {_line(rows, numbers, i)}" for i in chosen)


def of_rollout(
    asked: Mapping[str, Any],
    samples: sampling.Samples,
    verdict: Any,
    group: int = 1,
    *,
    logp: jax.Array | None = None,
) -> Rows:
    """Samples as they were judged (`rollouts.Verdict`), a group for each prompt.

    logp: `[R, T]`, what the trainer says of their tokens.
    """
    mask, drawn, lengths = (np.asarray(jax.device_get(x)) for x in (samples.mask, samples.logp, samples.lengths))
    rewards = np.asarray(verdict.reward, np.float64)
    spread = np.repeat(rewards.reshape(-1, group).std(axis=1), group)
    mean = np.where(mask, drawn, 0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    numbers = {"reward": rewards, "length": lengths, "logp": mean}
    if group > 1:
        numbers["spread"] = spread
    if logp is not None:
        numbers["gap"] = np.where(mask, np.abs(np.asarray(jax.device_get(logp)) - drawn), 0).max(axis=1)
    prompts = [str(prompt) for prompt in asked["prompts"] for _ in range(group)]
    names = [f"row {i}, prompt {i // group}" if group > 1 else f"row {i}" for i in range(len(rewards))]
    return Rows(names, prompts, list(verdict.completions), numbers)


def of_batch(loaded: hf.Loaded, params: Params, batch: Mapping[str, Any], place: str) -> Rows:
    """Rows of data that weigh something: tokens, segments, mask `[B, T]` or, a side of a pair a row, `[B, 2, T]`.

    Their log-probabilities, a reward model's their scores, are taken anew, a row at a time, by the parameters there are
    now; not where several processes have the parameters.

    Args:
      loaded: the model and its tokenizer.
      params: the model's.
      batch: as `alignax.data.batches` collates it.
      place: where the batch comes from, for the names.
    """
    counted = np.flatnonzero(np.asarray(batch["weights"]) > 0)
    tokens, segments, mask = (np.asarray(batch[name])[counted] for name in ("tokens", "segments", "mask"))
    sides = ("",) if tokens.ndim == 2 else (", chosen", ", rejected")
    names = [f"{place}, row {i}{side}" for i in counted for side in sides]
    tokens, segments, mask = (x.reshape(-1, x.shape[-1]) for x in (tokens, segments, mask))
    numbers: dict[str, Any] = {"length": mask.sum(axis=1)}
    if jax.process_count() == 1:
        name = "logp" if loaded.model.values is None else "score"
        numbers[name] = jax.device_get(_scored(loaded.model)(params, (tokens, segments, mask)))
    before = (segments != 0) & (np.cumsum(mask, axis=1) == 0)
    prompts, completions = (text.decode(loaded.tokenizer, tokens, on) for on in (before, mask))
    return Rows(names, prompts, completions, numbers)


@functools.lru_cache(maxsize=1)
def _scored(model: Model) -> Any:
    def of_row(params: Params, rows: Any) -> jax.Array:
        tokens, segments, mask = rows
        if model.values is not None:
            return last_score(model, params, tokens, segments)
        logp = token_logprobs(model, params, tokens, segments, mask=mask)
        return jnp.where(mask, logp, 0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    return jax.jit(train.in_parts(of_row, 1))


def _line(rows: Rows, numbers: Mapping[str, np.ndarray], i: int) -> str:
    said = ", ".join(f"{name} {found[i]:.4g}" for name, found in numbers.items())
    return f"{rows.names[i]}: {said}: {_short(rows.prompts[i])} >>> {_short(rows.completions[i])}"


def _short(words: str) -> str:
    words = repr(words)
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN - 4]}...{words[-1]}"
