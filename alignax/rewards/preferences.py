"""Preferences between completions, `prefer(prompts, first, second, **columns) -> list[float]`, and what comes of them.

A preference is the probability that the first completion is the better one. Models of it depend on the order they are
shown; everything here asks in both orders and gives p(i > j) = 1 - p(j > i). Losses take it as a constant.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax.types import Array, Scalar

Preference = Callable[..., Sequence[float]]


def symmetric_preference(logit_ij: Array, logit_ji: Array) -> Array:
    """Symmetric preference, mean logit: sigmoid((M_ij - M_ji) / 2), M_ij the logit that i, shown first, beats j.

    1/2 for identical candidates, whatever the model says of them. PairRM is read so; see "LLM-Blender: Ensembling
    Large Language Models with Pairwise Ranking and Generative Fusion", Jiang et al.
    (https://arxiv.org/abs/2306.02561). TRL's soft judge is sharper: `preference_matrix(pairwise_scores(M))`.

    Args:
      logit_ij, logit_ji: of any one shape.
    """
    return jax.nn.sigmoid(_difference(logit_ij, logit_ji) / 2)


def symmetric_preference_mean(logit_ij: Array, logit_ji: Array) -> Array:
    """Symmetric preference, mean probability: (sigmoid(M_ij) + 1 - sigmoid(M_ji)) / 2.

    For judges that give probabilities. See "Nash Learning from Human Feedback", Munos et al.
    (https://arxiv.org/abs/2312.00886).

    Args:
      logit_ij, logit_ji: of any one shape.
    """
    _difference(logit_ij, logit_ji)  # checked
    first, second = (jax.nn.sigmoid(jnp.asarray(x, jnp.float32)) for x in (logit_ij, -logit_ji))
    return (first + second) / 2


def pairwise_scores(logits: Float[Array, "B K K"]) -> Float[Array, "B K"]:
    """Scores from pairwise logits: score_i = mean_j (M_ij - M_ji), M_ij the logit that i, shown first, beats j.

    LLM-Blender's, the mean including j = i. See "LLM-Blender: Ensembling Large Language Models with Pairwise Ranking
    and Generative Fusion", Jiang et al. (https://arxiv.org/abs/2306.02561).

    Args:
      logits: `[B, K, K]`, of K candidates for each prompt; the diagonal does not matter.
    """
    _square(logits)
    logits = logits.astype(jnp.float32)
    difference = jnp.where(jnp.eye(logits.shape[-1], dtype=bool)[None], 0.0, logits - logits.swapaxes(1, 2))
    return jnp.mean(difference, axis=2)


def preference_matrix(scores: Float[Array, "B K"]) -> Float[Array, "B K K"]:
    """Bradley-Terry preferences: P_ij = sigmoid(s_i - s_j), 1/2 on the diagonal.

    See "Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons", Bradley and Terry
    (https://doi.org/10.2307/2334029).

    Args:
      scores: `[B, K]`, of K candidates for each prompt.
    """
    chex.assert_rank(scores, 2)
    scores = scores.astype(jnp.float32)
    return jax.nn.sigmoid(scores[:, :, None] - scores[:, None, :])


def win_rates(scores: Float[Array, "B K"], *, include_self: bool = True) -> Float[Array, "B K"]:
    """Win rates from scores: mean_j sigmoid(s_i - s_j), how often a candidate beats the K drawn with it.

    What SPPO regresses to; its code has j = i among them, as 1/2. See "Self-Play Preference Optimization for Language
    Model Alignment", Wu et al. (https://arxiv.org/abs/2405.00675), section 4.

    Args:
      scores: `[B, K]`, such as `pairwise_scores` gives.
      include_self: whether the mean has j = i (SPPO's code); without, it is unbiased.
    """
    return mean_win_rates(preference_matrix(scores), include_self=include_self)


def mean_win_rates(preferences: Float[Array, "B K K"], *, include_self: bool = True) -> Float[Array, "B K"]:
    """Win rates from preferences: mean_j P_ij, for preferences that need not come from scores.

    See "Self-Play Preference Optimization for Language Model Alignment", Wu et al. (https://arxiv.org/abs/2405.00675),
    section 4.

    Args:
      preferences: `[B, K, K]`, P_ij the probability that i beats j; the diagonal counts as 1/2.
      include_self: whether the mean has j = i; without, it is over K - 1.

    Raises:
      ValueError: for preferences known to lie outside [0, 1], or one candidate without itself.
    """
    _square(preferences)
    if not isinstance(preferences, Tracer) and not np.all((0 <= (p := np.asarray(preferences, np.float32))) & (p <= 1)):
        raise ValueError(f"mean_win_rates: preferences {p.tolist()}; expected probabilities, from 0 to 1")
    count = preferences.shape[-1]
    if count == 1 and not include_self:
        raise ValueError("mean_win_rates: one candidate and include_self=False; expected 2 candidates or more")
    own = jnp.eye(count, dtype=bool)[None]
    total = jnp.sum(jnp.where(own, 0.5 if include_self else 0.0, preferences.astype(jnp.float32)), axis=2)
    return total / (count if include_self else count - 1)


def compare(
    prefer: Preference,
    prompts: Sequence[Any],
    first: Sequence[str],
    second: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
    sides: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] | None = None,
) -> np.ndarray:
    """Preference in both orders: (p(first, second) + 1 - p(second, first)) / 2, float32 `[B]`, checked.

    Which order a judge is shown changes what it says. Identical completions get 1/2. See "RLAIF vs. RLHF: Scaling
    Reinforcement Learning from Human Feedback with AI Feedback", Lee et al. (https://arxiv.org/abs/2309.00267).

    Args:
      prefer: `(prompts, first, second, **columns) -> list[float]`; it takes the columns it knows and `**_` for others.
      prompts, first, second: B of each.
      columns: name -> B values that belong to the prompts.
      sides: name -> values of the first and of the second completions, which `prefer` gets as `first_NAME` and
        `second_NAME`, and the other way round when it is shown the other order.

    Raises:
      ValueError: for a column of another length, another number of preferences than pairs, or one that is no
        probability; the error names the row and its prompt.
    """
    columns, sides = dict(columns or {}), dict(sides or {})
    forth = _ask(prefer, prompts, first, second, columns, {name: pair for name, pair in sides.items()})
    back = _ask(prefer, prompts, second, first, columns, {name: pair[::-1] for name, pair in sides.items()})
    same = np.array([a == b for a, b in zip(first, second)], bool)
    return np.where(same, 0.5, (forth + 1 - back) / 2).astype(np.float32)


def shift_preference(preference: np.ndarray, logits: Scalar | np.ndarray) -> np.ndarray:
    """Shifted preference: sigmoid(logit(p) + logits), what a penalty of a Bradley-Terry score does to a preference.

    Where the shift is 0 nothing changes; elsewhere p is kept 1e-6 away from 0 and 1, so that certainty can be shifted.
    """
    bounded = np.clip(np.asarray(preference, np.float64), 1e-6, 1 - 1e-6)
    shifted = 1 / (1 + np.exp(-(np.log(bounded) - np.log1p(-bounded) + logits)))
    return np.where(np.asarray(logits) == 0, preference, shifted).astype(np.float32)


def _ask(prefer, prompts, first, second, columns, sides) -> np.ndarray:
    named = {f"{side}_{name}": pair[i] for name, pair in sides.items() for i, side in enumerate(("first", "second"))}
    if taken := {"prompts", "first", "second", *named} & set(columns):
        raise ValueError(f"compare: a column is named {taken.pop()!r}, which is an argument of every preference")
    columns = columns | named
    for name, values in {"first": first, "second": second, **columns}.items():
        if len(values) != len(prompts):
            raise ValueError(f"compare: {len(prompts)} prompts, but {len(values)} values of {name!r}")
    found = list(prefer(prompts, first, second, **columns))
    name = getattr(prefer, "__name__", repr(prefer))
    if len(found) != len(prompts):
        raise ValueError(f"preference {name} returned {len(found)} numbers for {len(prompts)} pairs")
    for row, value in enumerate(found):
        if not (isinstance(value, SupportsFloat) and 0 <= float(value) <= 1):  # NaN is not
            raise ValueError(
                f"preference {name} returned {value!r} for row {row}, prompt {prompts[row]!r}, completions "
                f"{first[row]!r} and {second[row]!r}; expected a probability"
            )
    return np.array([float(value) for value in found], np.float64)


def _difference(logit_ij: Array, logit_ji: Array) -> Array:
    chex.assert_equal_shape([jnp.asarray(logit_ij), jnp.asarray(logit_ji)])
    return jnp.asarray(logit_ij, jnp.float32) - jnp.asarray(logit_ji, jnp.float32)


def _square(matrix: Array) -> None:
    chex.assert_rank(matrix, 3)
    chex.assert_shape(matrix, (None, matrix.shape[-1], matrix.shape[-1]))
