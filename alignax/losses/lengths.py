"""DPO told about lengths, so that a longer answer does not win for its length: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected, n its number of tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check, check_positive
from alignax.losses._sides import average_log_ratio, check_sides, log_ratio, log_ratios
from alignax.types import Array, Response, Scalar


def r_dpo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, alpha: Scalar = 0.01) -> Float[Array, " B"]:
    """R-DPO, length-regularised DPO: -log sigmoid(beta D + alpha (n_chosen - n_rejected)).

    A reward r - alpha n under the KL makes r = beta x + alpha n: a chosen side that is longer has won part of its
    margin by length, and learns less. See "Disentangling Length from Quality in Direct Preference Optimization", Park
    et al. (https://arxiv.org/abs/2403.19159).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      alpha: reward that a token costs, 0 for DPO (paper: alpha).

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("r_dpo", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    return -jax.nn.log_sigmoid(beta * (x_chosen - x_rejected) + alpha * (chosen.length - rejected.length))


def dpo_average(chosen: Response, rejected: Response, *, beta: Scalar = 5.0) -> Float[Array, " B"]:
    """Length-normalised DPO: -log sigmoid(beta (x_chosen / n_chosen - x_rejected / n_rejected)).

    See "Tulu 3: Pushing Frontiers in Open Language Model Post-Training", Lambert et al.
    (https://arxiv.org/abs/2411.15124). TRL's `sigmoid_norm`, open-instruct's `dpo_norm`.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds, per token: larger than DPO's by about a length (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("dpo_average", beta=beta)
    check_sides(chosen, rejected)
    return -jax.nn.log_sigmoid(beta * (average_log_ratio(chosen) - average_log_ratio(rejected)))


def ld_dpo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, alpha: Scalar = 0.5) -> Float[Array, " B"]:
    """LD-DPO, length desensitisation: DPO with every token past the shorter side's length weighted by alpha.

    log p = sum_{t <= n*} log p_t + alpha sum_{t > n*} log p_t, n* = min(n_chosen, n_rejected), under policy and
    reference. See "Length Desensitization in Direct Preference Optimization", Liu et al.
    (https://arxiv.org/abs/2409.06411).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      alpha: in [0, 1]: 1 for DPO, 0 to cut both sides at the same length (paper: alpha).

    Raises:
      ValueError: for a beta known not to be above 0, an alpha known to lie outside [0, 1].
    """
    _check("ld_dpo", beta, alpha)
    (head, tail), (other_head, other_tail) = _split(chosen, rejected)
    excess = log_ratio(tail) - log_ratio(other_tail)
    return -jax.nn.log_sigmoid(beta * (log_ratio(head) - log_ratio(other_head) + alpha * excess))


def ld_dpo_policy(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, alpha: Scalar = 0.5
) -> Float[Array, " B"]:
    """LD-DPO, the policy alone desensitised: `ld_dpo` whose reference keeps its whole log-probabilities.

    So do TRL up to 0.28 and LLaMA-Factory. At the reference the margin is then not 0. See "Length Desensitization in
    Direct Preference Optimization", Liu et al. (https://arxiv.org/abs/2409.06411).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      alpha: in [0, 1]: 1 for DPO (paper: alpha).

    Raises:
      ValueError: for a beta known not to be above 0, an alpha known to lie outside [0, 1].
    """
    _check("ld_dpo_policy", beta, alpha)
    (head, tail), (other_head, other_tail) = _split(chosen, rejected)
    margin = head.sum - other_head.sum + alpha * (tail.sum - other_tail.sum)
    return -jax.nn.log_sigmoid(beta * (margin - (chosen.ref_sum - rejected.ref_sum)))


def _check(loss: str, beta: Scalar, alpha: Scalar) -> None:
    check_positive(loss, beta=beta)
    check(loss, "alpha", alpha, lambda x: (0 <= x) & (x <= 1), "0 <= alpha <= 1")


def _split(*responses: Response) -> list[tuple[Response, Response]]:
    """Of each response the tokens up to the length of the shortest, and those past it: two masks of the same arrays."""
    check_sides(*responses)
    shortest = jnp.min(jnp.stack([response.length for response in responses]), axis=0)[:, None]

    def parts(response: Response) -> tuple[Response, Response]:
        mask = response.mask != 0
        public = jnp.cumsum(mask, axis=1) <= shortest
        return response._replace(mask=mask & public), response._replace(mask=mask & ~public)

    return [parts(response) for response in responses]
