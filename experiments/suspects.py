"""Which rows stand behind a number: found, and written out, only when there is something to say about it."""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np

from alignax import distributed, sampling, train
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
    sampler: Any = None,
    params: Any = None,
    whole: Callable[[Any], Params] | None = None,
) -> Rows:
    """Samples as they were judged, as many for each prompt: on several processes those that this one looks after.

    Args:
      asked: a batch of prompts.
      samples: rows of them, those of a prompt behind one another.
      verdict: `rollouts.Verdict`.
      sampler: `rollouts.Sampler`, whose scorer says what the parameters that there are now make of the tokens.
      params: those; all processes must then call this.
      whole: makes a model's parameters of them; None: they are.
    """
    group = len(verdict.reward) // len(asked["prompts"])
    own = distributed.own_rows(samples.tokens)
    arrays = {"mask": samples.mask, "drawn": samples.logp, "length": samples.lengths}
    if sampler is not None:
        arrays["logp"] = sampler.logp(params if whole is None else whole(params), samples)
    here = distributed.take_own_rows(arrays)
    mask, drawn, rewards = here["mask"], here["drawn"], np.asarray(verdict.reward, np.float64)
    mean = np.where(mask, drawn, 0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
    numbers = {"reward": rewards[own], "length": here["length"], "logp": mean}
    if group > 1:
        numbers["spread"] = np.repeat(rewards.reshape(-1, group).std(axis=1), group)[own]
    if "logp" in here:
        numbers["gap"] = np.where(mask, np.abs(here["logp"] - drawn), 0).max(axis=1)
    prompts = [str(asked["prompts"][i // group]) for i in own]
    return Rows([f"row {i}, prompt {i // group}" for i in own], prompts, list(verdict.completions), numbers)


def of_players(asked: Mapping[str, Any], samples: sampling.Samples, verdict: Any) -> Rows:
    """The same of rows [B * N, ...] that were judged by preferences [B, N, N]; a row's reward is its win rate."""
    rewards = np.asarray(verdict.preferences).mean(axis=2).ravel()
    completions = [text for texts in verdict.completions for text in texts]
    return of_rollout(asked, samples, types.SimpleNamespace(reward=rewards, completions=completions))


def of_batch(
    loaded: hf.Loaded, params: Any, batch: Any, position: Any, whole: Callable[[Any], Params] | None = None
) -> Rows:
    """Rows of data that weigh something, a side of a pair for one row; packed ones by themselves.

    Their log-probabilities, a reward model's their scores, are taken anew, a row at a time, by the parameters there are
    now; not where several processes have the parameters.

    Args:
      loaded: the model and its tokenizer.
      params: the parameters.
      batch: a mapping or a tuple with the fields tokens, segments, mask `[..., T]` and weights.
      position: where the data stand behind it, for the names: a `data.batching.Position`.
      whole: makes the model's parameters of `params`; None: they are.
    """
    fields = batch if isinstance(batch, Mapping) else batch._asdict()
    arrays = common.to_host({name: fields[name] for name in ("tokens", "segments", "mask", "weights")})
    weights, width = np.asarray(arrays["weights"]), arrays["tokens"].shape[-1]
    counted = np.flatnonzero(weights.ravel() > 0)
    rows = [
        np.asarray(arrays[name]).reshape(weights.size, -1, width)[counted] for name in ("tokens", "segments", "mask")
    ]
    sides = ("",) if rows[0].shape[1] == 1 else (", chosen", ", rejected")
    place = f"epoch {position[0]}, batch {position[1] - 1}" if isinstance(position, tuple) else str(position)
    names = [f"{place}, row {i}{side}" for i in counted for side in sides]
    tokens, segments, mask = (x.reshape(-1, width) for x in rows)
    mask = mask != 0
    numbers: dict[str, Any] = {"length": mask.sum(axis=1)}
    if jax.process_count() == 1:
        name, params = "logp" if loaded.model.values is None else "score", params if whole is None else whole(params)
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
