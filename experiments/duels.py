"""Samples of several players side by side, leaves [B, N, ...], and what is said about every pair of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import rollouts

from alignax import distributed, rewards, sampling, sharding
from alignax.data import text
from alignax.io import hf


@partial(jax.jit, static_argnums=0)
def side_by_side(count: int, parts: Sequence[sampling.Samples]) -> sampling.Samples:
    """Samples of several players for so many prompts, leaves [B * n, ...] of each, as [B, N, ...]."""
    apart = [jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), part) for part in parts]
    return jax.tree.map(lambda *x: sharding.constrain(jnp.concatenate(x, axis=1), sharding.ROW_AXES), *apart)


@jax.jit
def in_rows(samples: sampling.Samples) -> sampling.Samples:
    """Leaves [B, N, ...] as [B * N, ...]."""
    return jax.tree.map(lambda x: sharding.constrain(x.reshape(-1, *x.shape[2:]), sharding.ROW_AXES), samples)


@jax.jit
def chosen(samples: Any, which: Any) -> Any:
    """Of leaves [B, N, T] those of the players `which` [B, K], as [B, K, T]."""
    at = jnp.asarray(which)[:, :, None]
    return jax.tree.map(lambda x: sharding.constrain(jnp.take_along_axis(x, at, axis=1), sharding.ROW_AXES), samples)


@jax.jit
def of_first(samples: Any) -> Any:
    """Of leaves [B, N, ...] those of the first player, as [B, ...]."""
    return jax.tree.map(lambda x: sharding.constrain(x[:, 0], sharding.ROW_AXES), samples)


class Verdict(NamedTuple):
    """What is said about [B, N] samples. preferences: `[B, N, N]`, how probably each is better than each other.

    completions: of the prompts that this process looks after (`distributed.own_rows`), all where it is alone.
    """

    completions: list[list[str]]
    preferences: np.ndarray


def ask(
    prefer: rewards.Preference, asked: dict, own: np.ndarray, completions: list[list[str]], cut: np.ndarray
) -> np.ndarray:
    """What a preference function says of all pairs of each prompt's completions, of the prompts `own` of a batch.

    cut [own, N]: which were cut off.
    """
    rows, count = cut.shape
    pairs = [(b, i, j) for b in range(rows) for i in range(count) for j in range(i + 1, count)]
    names = {name: None for row in asked["columns"] for name in row}
    columns = {name: [asked["columns"][own[b]].get(name) for b, _, _ in pairs] for name in names}
    first, second = ([completions[pair[0]][pair[side]] for pair in pairs] for side in (1, 2))
    first_cut, second_cut = ([bool(cut[pair[0], pair[side]]) for pair in pairs] for side in (1, 2))
    prompts = [asked["prompts"][own[b]] for b, _, _ in pairs]
    sides = {"truncated": (first_cut, second_cut)}
    found = rewards.compare(prefer, prompts, first, second, columns, sides) if pairs else ()
    matrix = np.full((rows, count, count), 0.5, np.float32)
    for (b, i, j), p in zip(pairs, found):
        matrix[b, i, j], matrix[b, j, i] = p, 1 - p
    return matrix


def make_judge(config: Any, loaded: hf.Loaded) -> Callable[[dict, sampling.Samples], Verdict]:
    """Makes `judge(asked, samples) -> Verdict`, of the preference or the reward that the configuration names."""
    prefer = rollouts.find_function("prefer", config.prefer) if config.prefer else None
    summands = [] if prefer else [rollouts.rule(config.reward, 1.0)]

    def judge(asked: dict, samples: sampling.Samples) -> Verdict:
        count = samples.truncated.shape[1]
        if prefer:
            own = distributed.own_rows(samples.tokens)
            here = distributed.take_own_rows({name: getattr(samples, name) for name in ("tokens", "mask", "truncated")})
            tokens, mask = (here[name].reshape(-1, here[name].shape[-1]) for name in ("tokens", "mask"))
            completions = grouped(text.decode(loaded.tokenizer, tokens, mask, eos_ids=loaded.eos_ids), count)
            found = ask(prefer, asked, own, completions, here["truncated"])
            preferences = distributed.join_rows(found, samples.tokens)
        else:
            verdict = rollouts.judge(summands, loaded, asked, in_rows(samples), count)
            completions, scores = grouped(verdict.completions, count), verdict.reward.reshape(-1, count)
            preferences = common.to_host(rewards.preference_matrix(jnp.asarray(config.reward_scale * scores)))
        missing = common.to_host(samples.truncated).astype(np.float32)
        shift = config.missing_eos_penalty * (missing[:, None, :] - missing[:, :, None])
        return Verdict(completions, rewards.shift_preference(preferences, shift))

    return judge


def grouped(texts: Sequence[str], count: int) -> list[list[str]]:
    """Texts of rows as lists of so many, one for each prompt."""
    return [list(texts[i : i + count]) for i in range(0, len(texts), count)]


def describe(samples: sampling.Samples, verdict: Verdict, counted: np.ndarray) -> dict[str, Any]:
    """What samples were like, over the prompts that count."""
    distinct = np.array([len(set(found)) for found in verdict.completions], np.int32)
    distinct = distributed.join_rows(distinct, samples.tokens)
    sizes = common.to_host({"length": samples.lengths, "truncated": samples.truncated})
    means = {name: x[counted].mean() for name, x in sizes.items()}
    return means | {"duplicates": (1 - distinct / samples.lengths.shape[1])[counted].mean()}
