"""Auxiliary losses of a mixture of experts, from the sums its router keeps (`Hidden.aux`, `Scores.aux`)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Mean


def load_balancing(aux: Mapping[str, Array], expert_load: Float[Array, " E"] | None = None) -> Mean:
    """Load balancing: E sum_e f_e P_e over E experts, f_e choices of e per token, P_e its mean probability.

    k when all are even. Both are taken over the tokens of all layers together, as transformers does. Only P has a
    gradient.

    See "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", Fedus et al.
    (https://arxiv.org/abs/2101.03961), eq. 4.

    Args:
      aux: what a mixture's `hidden` returns: "expert_tokens" and "expert_probs" [L, E], "router_rows" [].
      expert_load: f over the whole batch, where these rows are a part of it. Then parts add up exactly. None: f of
        these rows, and the mean over parts is the mean of their losses. See "Demons in the Detail: On Implementing Load
        Balancing Loss for Training Specialized Mixture-of-Experts Models", Qiu et al.
        (https://arxiv.org/abs/2501.11873).

    Raises:
      ValueError: when the model has no router.
    """
    _check(aux)
    if expert_load is None:
        expert_load = mean_load(aux).value()
    probs = jnp.sum(aux["expert_probs"], axis=0)
    return Mean(probs.shape[0] * jnp.sum(jax.lax.stop_gradient(expert_load) * probs), aux["router_rows"])


def mean_load(aux: Mapping[str, Array]) -> Mean:
    """Expert load: f_e = choices of expert e / tokens, over the tokens of all layers; it sums to k.

    See "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity", Fedus et al.
    (https://arxiv.org/abs/2101.03961), eq. 5, where k is 1.
    """
    _check(aux)
    return Mean(jnp.sum(aux["expert_tokens"], axis=0), aux["router_rows"])


def router_z(aux: Mapping[str, Array]) -> Mean:
    """Router z-loss: logsumexp(logits)^2, its mean over tokens and layers; keeps the router's logits small.

    See "ST-MoE: Designing Stable and Transferable Sparse Expert Models", Zoph et al.
    (https://arxiv.org/abs/2202.08906), eq. 5.
    """
    _check(aux)
    return Mean(jnp.sum(aux["router_z"]), aux["router_rows"])


def _check(aux: Mapping[str, Array]) -> None:
    if "router_rows" not in aux:
        raise ValueError(f"the model has no router: its aux holds {sorted(aux)}; expected a mixture of experts")
