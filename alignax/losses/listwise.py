"""Losses over K candidates of one prompt, ranked or rated: `loss(scores, ranks or rewards, valid, *, ...) -> [B]`.

`valid [B, K]` says which candidates there are; the others may hold anything. A prompt with nothing to compare costs 0:
where it should not count in a mean either, it weighs 0 there. The policy versions take log-ratios
x = log pi(y|x) - log ref(y|x) of whole answers, of which the reference is a constant. Rewards and ranks are constants.
"""

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Bool, Float, Shaped

from alignax.losses._checks import check_positive
from alignax.types import Array, Scalar


def kwise(rewards: Float[Array, "B K"], ranks: Shaped[Array, "B K"], valid: Shaped[Array, "B K"]) -> Float[Array, " B"]:
    """K-wise comparison: the mean of -log sigmoid(r_i - r_j) over the pairs of a prompt in which i is ranked above j.

    All pairs of a prompt in one step, each prompt with the same weight: taken one by one over an epoch they overfit.
    See "Training language models to follow instructions with human feedback", Ouyang et al.
    (https://arxiv.org/abs/2203.02155), eq. 1.

    Args:
      rewards: `[B, K]`, the scores of the reward model.
      ranks: `[B, K]`, 1 is the best; candidates of one rank are not compared.
      valid: `[B, K]`, which candidates there are.
    """
    rewards = _candidates(rewards, ranks, valid)
    compared = _both(valid) & (ranks[:, :, None] < ranks[:, None, :])
    loss = jax.nn.softplus(rewards[:, None, :] - rewards[:, :, None])
    pairs = jnp.sum(compared, axis=(1, 2))
    return jnp.sum(jnp.where(compared, loss, 0.0), axis=(1, 2)) / jnp.maximum(pairs, 1)


def plackett_luce(
    scores: Float[Array, "B K"], ranks: Shaped[Array, "B K"], valid: Shaped[Array, "B K"], *, top: Scalar | None = None
) -> Float[Array, " B"]:
    """Plackett-Luce likelihood of a ranking (ListMLE): -sum_k (s_k - log sum_{j ranked k or below} e^s_j).

    The best is chosen among all, the second among the rest, and so on; K = 2 is `bradley_terry`. Candidates of one rank
    are each chosen from all that are not above them (Breslow), so that their order in the array does not matter. See
    "The Analysis of Permutations", Plackett (https://doi.org/10.2307/2346567), and "Listwise Approach to Learning to
    Rank: Theory and Algorithm", Xia et al. (https://doi.org/10.1145/1390156.1390306).

    Args:
      scores: `[B, K]`.
      ranks: `[B, K]`, 1 is the best; only their order matters.
      valid: `[B, K]`, which candidates there are.
      top: how many of the choices count, from the best on (the order of the others says nothing); None: all.

    Raises:
      ValueError: for a top known to be below 1.
    """
    if top is not None and not isinstance(top, Tracer) and top < 1:
        raise ValueError(f"plackett_luce: top={top}; expected 1 or more, or None for all")
    scores = _candidates(scores, ranks, valid)
    above = _both(valid) & (ranks[:, None, :] < ranks[:, :, None])  # [b, k, j]: j is better than k
    rest = (
        _both(valid) & ~above | jnp.eye(ranks.shape[1], dtype=bool)[None]
    )  # an invalid k has itself, for its gradient
    choice = jax.nn.logsumexp(jnp.where(rest, scores[:, None, :], -jnp.inf), axis=2) - scores
    counted = valid != 0
    if top is not None:
        counted &= jnp.sum(above, axis=2) < top
    return jnp.sum(jnp.where(counted, choice, 0.0), axis=1)


def best_of_k(
    scores: Float[Array, "B K"], best: Shaped[Array, " B"], valid: Shaped[Array, "B K"]
) -> Float[Array, " B"]:
    """Best of K: -log softmax(s)_best, where only the best of the candidates was named.

    See "Fine-Tuning Language Models from Human Preferences", Ziegler et al. (https://arxiv.org/abs/1909.08593), eq. 1.

    Args:
      scores: `[B, K]`.
      best: `[B]`, the number of the best candidate, from 0; one that is not valid costs 0.
      valid: `[B, K]`, which candidates there are.
    """
    chex.assert_rank(scores, 2)
    chex.assert_shape(best, scores.shape[:1])
    chosen = jnp.arange(scores.shape[1])[None] == best[:, None]
    return plackett_luce(scores, jnp.where(chosen, 1, 2), valid, top=1) * jnp.any(chosen & (valid != 0), axis=1)


def plackett_luce_dpo(
    log_ratios: Float[Array, "B K"],
    ranks: Shaped[Array, "B K"],
    valid: Shaped[Array, "B K"],
    *,
    beta: Scalar = 0.1,
    top: Scalar | None = None,
) -> Float[Array, " B"]:
    """Plackett-Luce DPO: `plackett_luce` of the implicit rewards, s = beta x; K = 2 is `dpo`.

    See "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", Rafailov et al.
    (https://arxiv.org/abs/2305.18290), eq. 20.

    Args:
      log_ratios: `[B, K]`, of whole answers (paper: log pi / pi_ref).
      ranks, valid, top: as for `plackett_luce`.
      beta: how strongly the reference holds (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0, a top known to be below 1.
    """
    check_positive("plackett_luce_dpo", beta=beta)
    return plackett_luce(beta * _candidates(log_ratios, ranks, valid), ranks, valid, top=top)


def infonca(
    log_ratios: Float[Array, "B K"],
    rewards: Float[Array, "B K"],
    valid: Shaped[Array, "B K"],
    *,
    beta: Scalar = 0.01,
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """InfoNCA: -sum_k softmax(reward / temperature)_k log softmax(beta x)_k.

    Which of K answers came from the rewarded policy, as a cross-entropy over them; two answers whose rewards are far
    apart make it `dpo`. See "Noise Contrastive Alignment of Language Models with Explicit Rewards", Chen et al.
    (https://arxiv.org/abs/2402.05369), section 3.

    Args:
      log_ratios: `[B, K]`, of whole answers.
      rewards: `[B, K]`, a constant.
      valid: `[B, K]`, which candidates there are.
      beta: how strongly the reference holds (paper: beta).
      temperature: of the rewards (paper: alpha).

    Raises:
      ValueError: for a beta or temperature known not to be above 0.
    """
    check_positive("infonca", beta=beta, temperature=temperature)
    log_ratios, target = _candidates(log_ratios, rewards, valid), _log_target(rewards, valid, temperature)
    return -_expected(target, _log_softmax(beta * log_ratios, valid), valid)


def nca(
    log_ratios: Float[Array, "B K"],
    rewards: Float[Array, "B K"],
    valid: Shaped[Array, "B K"],
    *,
    beta: Scalar = 0.01,
    temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """NCA: -sum_k softmax(reward / temperature)_k log sigmoid(beta x_k) - (1 / K) sum_k log sigmoid(-beta x_k).

    Each answer is judged by itself, which keeps a good one likely where `infonca` only has it likelier than the others.
    The authors' code adds 0.01 to the reward of the first candidate in both, so that no two are equal.
    See "Noise Contrastive Alignment of Language Models with Explicit Rewards", Chen et al.
    (https://arxiv.org/abs/2402.05369), section 4.

    Args:
      log_ratios: `[B, K]`, of whole answers.
      rewards: `[B, K]`, a constant.
      valid: `[B, K]`, which candidates there are; K counts these.
      beta: how strongly the reference holds (paper: beta).
      temperature: of the rewards (paper: alpha).

    Raises:
      ValueError: for a beta or temperature known not to be above 0.
    """
    check_positive("nca", beta=beta, temperature=temperature)
    logits, target = beta * _candidates(log_ratios, rewards, valid), _log_target(rewards, valid, temperature)
    uniform = jnp.where(valid != 0, jax.nn.softplus(logits), 0.0)
    count = jnp.maximum(jnp.sum(valid != 0, axis=1), 1)
    return jnp.sum(uniform, axis=1) / count + _expected(target, jax.nn.softplus(-logits), valid)


def exo_reward(
    log_ratios: Float[Array, "B K"],
    rewards: Float[Array, "B K"],
    valid: Shaped[Array, "B K"],
    *,
    beta: Scalar = 0.1,
    reward_temperature: Scalar = 1.0,
) -> Float[Array, " B"]:
    """EXO with rewards: sum_k q_k (log q_k - log p_k), q = softmax(beta x), p = softmax(reward / reward_temperature).

    The reverse KL, as in reinforcement learning, where `infonca` is the forward one: it seeks the best answers rather
    than covering all good ones. See "Towards Efficient Exact Optimization of Language Model Alignment", Ji et al.
    (https://arxiv.org/abs/2402.00856), section 3.

    Args:
      log_ratios: `[B, K]`, of whole answers.
      rewards: `[B, K]`, a constant.
      valid: `[B, K]`, which candidates there are.
      beta: how strongly the reference holds (paper: beta_pi).
      reward_temperature: of the rewards (paper: beta_r).

    Raises:
      ValueError: for a beta or temperature known not to be above 0.
    """
    check_positive("exo_reward", beta=beta, reward_temperature=reward_temperature)
    log_q = _log_softmax(beta * _candidates(log_ratios, rewards, valid), valid)
    return _expected(log_q, log_q - _log_target(rewards, valid, reward_temperature), valid)


def _candidates(x: Array, other: Array, valid: Array) -> Array:
    """x as float32, 0 where there is no candidate."""
    chex.assert_rank([x, other, valid], 2)
    chex.assert_equal_shape([x, other, valid])
    return jnp.where(valid != 0, x.astype(jnp.float32), 0.0)


def _both(valid: Array) -> Bool[Array, "B K K"]:
    return (valid != 0)[:, :, None] & (valid != 0)[:, None, :]


def _log_softmax(x: Array, valid: Array) -> Array:
    # not -inf, whose differences are NaN: e^-1e30 is 0 as well
    return jax.nn.log_softmax(jnp.where(valid != 0, x, -1e30), axis=1)


def _log_target(rewards: Array, valid: Array, temperature: Scalar) -> Array:
    rewards = jnp.where(valid != 0, rewards.astype(jnp.float32), 0.0)
    return jax.lax.stop_gradient(_log_softmax(rewards / temperature, valid))


def _expected(log_weights: Array, x: Array, valid: Array) -> Array:
    """sum_k e^log_weights_k x_k over the candidates there are."""
    return jnp.sum(jnp.where(valid != 0, jnp.exp(log_weights) * x, 0.0), axis=1)
