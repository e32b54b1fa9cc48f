"""The pairwise objectives by name, and rows of pairs with what single objectives need beside the two completions."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax import data, losses, reduce
from alignax.algorithms import preference
from alignax.types import Model, Response


class Objective(NamedTuple):
    """A pairwise loss as `preference.make_loss` takes it."""

    loss: Callable
    nll_weight: float | None = None  # of its supervised summand
    nll_mean: Callable = reduce.token_mean
    reward: Callable = preference.whole  # what its metrics call a reward, over beta
    reference: bool = True  # False: it reads none


def free(loss: Callable, nll_weight: float | None = None, reward: Callable = preference.average) -> Objective:
    """An objective without a reference."""
    return Objective(loss, nll_weight, reward=reward, reference=False)


NAMED = (
    *(losses.dpo, losses.robust_dpo, losses.ipo, losses.hinge, losses.exo_pair, losses.exo_official, losses.discopop),
    *(losses.apo_zero, losses.apo_down, losses.nca_pair, losses.bco_pair, losses.kto_pair, losses.sppo),
    *(losses.sppo_hard, losses.aot, losses.aot_unpaired, losses.odpo, losses.rpo_backward_kl, losses.rpo_forward_kl),
    *(losses.rpo_squared, losses.r_dpo, losses.ld_dpo, losses.ld_dpo_policy, losses.dpop),
    *(losses.mdpo, losses.rpo, losses.beta_dpo, losses.dpo_soft, losses.ipo_soft),
)
OBJECTIVES: dict[str, Objective] = {
    **{loss.__name__: Objective(loss) for loss in NAMED},
    **{loss.__name__: Objective(loss, reward=preference.with_kl) for loss in (losses.tdpo1, losses.tdpo2)},
    "ipo_average": Objective(losses.ipo_average),
    "dpo_average": Objective(losses.dpo_average),
    "rpo_token_nll": Objective(losses.dpo, nll_weight=1.0),
    "mpo": Objective(losses.mpo, nll_weight=1.0),
    "cpo": free(losses.cpo, 1.0, preference.whole)._replace(nll_mean=reduce.sequence_sum),
    "cpo_token_nll": free(losses.cpo, 1.0, preference.whole),  # TRL's
    "slic_hf": free(losses.slic_hf, None, preference.whole),
    "simpo": free(losses.simpo),
    "simpo_hinge": free(losses.simpo_hinge),
    "cpo_simpo": free(losses.simpo, 0.05),
    "alphapo": free(losses.alphapo),
    "orpo": free(losses.orpo, 1.0),
    **{
        name: Objective(functools.partial(losses.gpo, convex=getattr(losses, name)))
        for name in ("gpo_logistic", "gpo_hinge", "gpo_squared", "gpo_exponential", "gpo_truncated_quadratic")
        + ("gpo_savage",)
    },
}
DIVERGENCES = {
    "reverse_kl": losses.f_reverse_kl,
    "forward_kl": losses.f_forward_kl,
    "jensen_shannon": losses.f_jensen_shannon,
    "alpha": losses.f_alpha,
}
# what a column of the data says of the pair, or of each side
OF_PAIR = ("margin", "preference")
OF_SIDES = ("reward", "win_rate")


def underlying(loss: Callable) -> Callable:
    """The function behind `functools.partial`."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def is_pairwise(loss: Any) -> bool:
    """Whether it is a function of a chosen and a rejected `Response`, or of a first and a second."""
    if not inspect.isfunction(loss):
        return False
    sides = list(inspect.signature(loss).parameters.values())[:2]
    return len(sides) == 2 and all(side.annotation is Response for side in sides)


def objective(name: str, *, divergence: str = "reverse_kl", alpha: float | None = None, wpo: bool = False) -> Objective:
    """The objective of a name, held to its reference by another divergence, and weighted as WPO does.

    Raises:
      ValueError: for an unknown name, or a divergence that the loss does not take.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"loss={name!r}; expected one of {', '.join(sorted(OBJECTIVES))}")
    found = OBJECTIVES[name]
    if alpha is not None and divergence != "alpha":
        raise ValueError(f"divergence_alpha={alpha} with divergence={divergence!r}; expected alpha")
    if divergence != "reverse_kl":
        if "divergence" not in inspect.signature(found.loss).parameters:
            raise ValueError(f"divergence={divergence!r}: {name} is not a function of log-ratios that takes one")
        held = DIVERGENCES[divergence] if alpha is None else functools.partial(losses.f_alpha, alpha=alpha)
        found = found._replace(loss=functools.partial(found.loss, divergence=held))
    return found._replace(loss=losses.wpo(found.loss)) if wpo else found


def try_out(loss: Callable, hyper: Mapping[str, float]) -> None:
    """Calls the loss once with these numbers: inside an update they are traced, and it could refuse nothing."""
    tokens = jnp.full((2, 1), -1.0)
    per_token = ("forward_kl", "log_sum_p2", "degraded_logp", "degraded_ref_logp", "degraded_mask")
    extra = {name: tokens if name in per_token else jnp.full(2, 0.5) for name in losses.needed(loss)}
    side = Response(tokens, tokens, tokens != 0, extra)
    keywords = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    required = {p.name: 0.0 for p in keywords if p.default is p.empty and p.name not in hyper}
    loss(side, side, **required, **hyper)


def schedule(config: Any) -> dict[str, float]:
    """The arguments of `train.ema_every` that a reference schedule stands for."""
    every = {"soft": config.reference_every, "hard": config.reference_every}.get(config.reference, 1)
    return {"every": every, "rate": 1.0 if config.reference == "hard" else config.reference_rate}


# losses whose statistics change from batch to batch: what stands for them in an evaluation
STILL = {"beta_dpo": {"gap_mean": 0.0, "selected_mean": 0.0}}


def make_dynamic_beta(model: Model) -> Callable:
    """Makes `prepare(state, batch, frozen, hyper, moments) -> batch, hyper, moments`: the pairs that beta-DPO selects.

    The moments are the running mean and deviation of the pairs' gaps, 0 at the start. The forward pass that it
    takes is one more than other losses need: which pairs count depends on all of them. What it finds of the
    reference goes along with the batch.
    """

    @jax.jit
    def gaps_of(params, batch, frozen):
        chosen, rejected = preference.sides(model, params, batch, frozen)
        gaps = preference.whole(chosen) - preference.whole(rejected)
        assert chosen.ref_logp is not None and rejected.ref_logp is not None  # `frozen` holds a reference
        return gaps, jnp.stack([chosen.ref_logp, rejected.ref_logp], axis=1)

    def prepare(state, batch, frozen, hyper, moments):
        gaps, ref_logp = gaps_of(state.params, batch, frozen)
        mean, std = losses.beta_dpo_moments(moments[0], moments[1], gaps, batch.weights)
        key = jax.random.fold_in(state.key, state.step)
        weights = losses.beta_dpo_select(key, gaps, batch.weights, mean=mean, std=std)
        selected = reduce.batch_mean(gaps, weights).value()
        batch = batch._replace(weights=weights, ref_logp=ref_logp)
        return batch, hyper | {"gap_mean": mean, "selected_mean": selected}, (mean, std)

    return prepare


class PairRow(NamedTuple):
    """A pair's rows with what its columns say."""

    pair: data.TokenPair
    extra: dict[str, np.ndarray]  # a number, or one for each side
    degraded: data.TokenRow | None  # the chosen completion after the degraded prompt

    @property
    def length(self) -> int:
        """Of the longest row, in tokens."""
        return max(self.pair.length, 0 if self.degraded is None else self.degraded.length)


def read_extras(pair: data.Pair, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The numbers a loss needs, from the columns `margin` and `preference`, or `chosen_NAME` and `rejected_NAME`."""

    def number(column: str) -> float:
        value = pair.columns.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise data.BadRow(pair.where, f"wrong {column}", f"{value!r}; the loss needs a number there")
        return value

    extra = {name: np.asarray(number(name), np.float32) for name in OF_PAIR if name in names}
    for name in OF_SIDES:
        if name in names:
            extra[name] = np.array([number(f"{side}_{name}") for side in ("chosen", "rejected")], np.float32)
    return extra


def read_degraded(encode: Callable[..., Any], pair: data.Pair) -> data.TokenRow:
    """The chosen completion after the prompt of the column `degraded_prompt`."""
    prompt = pair.columns.get("degraded_prompt")
    if type(prompt) is not type(pair.prompt):
        found = f"{prompt!r}; mdpo needs the prompt with its evidence removed, of the kind of the prompt itself"
        raise data.BadRow(pair.where, "wrong degraded_prompt", found)
    return encode(pair=pair._replace(prompt=prompt)).chosen


def collate(rows: list[PairRow], weights: np.ndarray, **options) -> dict[str, Any]:
    """The arrays of `preference.Batch`."""
    batch = data.batching.pairs([row.pair for row in rows], weights, **options)
    if rows[0].extra:
        batch["extra"] = {name: np.stack([row.extra[name] for row in rows]) for name in rows[0].extra}
    degraded = [row.degraded for row in rows if row.degraded is not None]
    if degraded:
        arrays = data.batching.supervised(degraded, weights, **options)
        batch["degraded"] = preference.Rows(arrays["tokens"], arrays["segments"], arrays["mask"])
    return batch
