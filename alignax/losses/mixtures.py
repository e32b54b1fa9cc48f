"""Pairwise losses made of others: weighted by how likely the policy is to have said the pair, and summed."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._sides import check_sides
from alignax.losses.absolute_preference import bco_pair
from alignax.losses.extras import (
    extra,
    needed,
    needs,
    needs_whole_batch,
    reads_reference,
    whole_batch,
    without_reference,
)
from alignax.losses.preference import dpo
from alignax.types import Array, Response, Scalar

PairwiseLoss = Callable[..., Array]
MAX_LOG_WEIGHT = 40.0  # no pair of responses reaches it, and e^40 times any loss is finite


def wpo(loss: PairwiseLoss = dpo, *, clamp: Scalar | None = 1.0) -> PairwiseLoss:
    """WPO, weighted preferences: sg(min(c, w_chosen w_rejected)) loss, w = exp(mean_t(log p_t - log sum_v p_v^2)).

    Makes a pairwise loss of another one. Answers that the policy would hardly say count less, so that data of other
    policies is reweighted towards its own; log sum_v p_v^2, the log of a sampled token's expected probability, makes
    the weight of the policy's own samples about 1 (open-instruct does without: give zeros). See "WPO: Enhancing RLHF
    with Weighted Preference Optimization", Zhou et al. (https://arxiv.org/abs/2406.11827).

    Args:
      loss: any pairwise loss; what is returned has its signature, and needs `log_sum_p2` `[B, T]` of both sides beside
        its extras.
      clamp: the largest weight (authors' code, TRL up to 0.28); None for none (TRL since 0.29).

    Raises:
      ValueError: for a clamp known not to be above 0, or a loss that compares the rows of a batch, in which no term
        belongs to one pair.
    """
    name = _name(loss)
    if clamp is not None:
        check_positive("wpo", clamp=clamp)
    if needs_whole_batch(loss):
        raise ValueError(f"wpo: {name} needs the whole batch; expected a loss whose [B] terms each belong to one pair")

    @needs(*dict.fromkeys((*needed(loss), "log_sum_p2")))
    @functools.wraps(loss)
    def weighted(chosen: Response, rejected: Response, **hyper) -> Float[Array, " B"]:
        check_sides(chosen, rejected)
        log_weight = jnp.minimum(_log_weight(chosen) + _log_weight(rejected), MAX_LOG_WEIGHT)
        weight = jnp.exp(log_weight)
        weight = weight if clamp is None else jnp.minimum(weight, clamp)
        return jax.lax.stop_gradient(weight) * loss(chosen, rejected, **hyper)

    return _rename(weighted, f"wpo_{name}", f"WPO of {name}: sg(min(w_chosen w_rejected, {clamp})) {name}.")


def mixture(parts: Mapping[PairwiseLoss, Scalar] | Sequence[tuple[Scalar, PairwiseLoss]]) -> PairwiseLoss:
    """Mixture of pairwise losses: sum_i w_i loss_i(chosen, rejected).

    Makes a pairwise loss of others, `mixture({losses.dpo: 0.8, losses.apo_zero: 0.2})`. A hyperparameter goes to every
    part that takes it; one bound by `functools.partial` belongs to its part, and stays. It needs what its parts need.

    Args:
      parts: loss to weight, or pairs (weight, loss) where a loss comes twice.

    Raises:
      ValueError: without parts; and, when called, for a hyperparameter that no part takes.
    """
    pairs = [(w, loss) for loss, w in parts.items()] if isinstance(parts, Mapping) else list(parts)
    if not pairs:
        raise ValueError("mixture: no parts; expected at least one loss and its weight")
    taken = [_hyperparameters(loss) for _, loss in pairs]
    known: dict[str, inspect.Parameter] = {}
    for parameters in taken:  # the default of the first part that takes it
        known |= {name: parameter for name, parameter in parameters.items() if name not in known}
    formula = " + ".join(f"{w} {_name(loss)}" for w, loss in pairs)

    @needs(*dict.fromkeys(name for _, loss in pairs for name in needed(loss)))
    def mixed(chosen: Response, rejected: Response, **hyper) -> Float[Array, " B"]:
        if unknown := sorted(hyper.keys() - known.keys()):
            raise ValueError(f"{formula}: no part takes {unknown}; expected among {sorted(known)}")
        terms = [
            w * loss(chosen, rejected, **{name: x for name, x in hyper.items() if name in names})
            for (w, loss), names in zip(pairs, taken, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    sides = [inspect.Parameter(name, kind, annotation=Response) for name in ("chosen", "rejected")]
    mixed.__signature__ = inspect.Signature([*sides, *known.values()])  # pyright: ignore[reportFunctionMemberAccess]
    if any(needs_whole_batch(loss) for _, loss in pairs):
        whole_batch(mixed)
    if not any(reads_reference(loss) for _, loss in pairs):
        without_reference(mixed)
    return _rename(mixed, "_".join(_name(loss) for _, loss in pairs), f"Mixture: {formula}.")


def mpo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, delta: Scalar = 0.0) -> Float[Array, " B"]:
    """MPO, mixed preference optimisation: 0.8 dpo + 0.2 bco_pair.

    Which of two is better, and how good each is; the third part, how to say it, is the NLL of the chosen side with
    weight 1: `alignax.algorithms.preference.make_loss(model, loss=losses.mpo, nll_weight=1.0)`. Other weights:
    `mixture`. See "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference
    Optimization", Wang et al. (https://arxiv.org/abs/2411.10442).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      delta: running mean of the rewards, the reference point of `bco_pair` (paper: delta).
    """
    return 0.8 * dpo(chosen, rejected, beta=beta) + 0.2 * bco_pair(chosen, rejected, beta=beta, delta=delta)


def _log_weight(response: Response) -> Float[Array, " B"]:
    """mean_t(log p_t - log sum_v p_v^2), 0 for an empty response."""
    expected = extra(response, "log_sum_p2", "wpo")
    chex.assert_equal_shape([expected, response.mask])
    return response.mean - response._replace(logp=expected).mean


def _hyperparameters(loss: PairwiseLoss) -> dict[str, inspect.Parameter]:
    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in bound}


def _name(loss: PairwiseLoss) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss.__name__


def _rename(loss: PairwiseLoss, name: str, doc: str) -> PairwiseLoss:
    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = doc
    return loss
