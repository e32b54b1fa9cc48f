"""Learning from pairs: a chosen and a rejected completion of one prompt, against a frozen reference.

Any pairwise loss drops in, and gets what it names (`alignax.losses.needs`).

Recipes:
  RPO, DPO with an NLL: `losses.dpo`, nll_weight 0.005 to 1 (https://arxiv.org/abs/2405.16436).
  Iterative RPO: `losses.rpo`, the NLL of each chosen side by its length (https://arxiv.org/abs/2404.19733).
  ORPO: `losses.orpo`, nll_weight 1, no reference, no SFT before (https://arxiv.org/abs/2403.07691).
  CPO: `losses.cpo`, nll_weight 1, nll_mean `reduce.sequence_sum`, no reference (https://arxiv.org/abs/2401.08417).
  CPO-SimPO: `losses.simpo`, nll_weight 0.05, no reference (https://arxiv.org/abs/2405.14734).
  MPO: `losses.mpo`, nll_weight 1 (https://arxiv.org/abs/2411.10442).
  Conservative DPO (cDPO): `losses.dpo`, label_smoothing above 0 (https://ericmitchell.ai/cdpo.pdf).
  f-DPO: any of these losses, divergence `losses.f_alpha` and others (https://arxiv.org/abs/2309.16240).
  WPO: `losses.wpo` around any of these losses (https://arxiv.org/abs/2406.11827).
  RSO: `losses.hinge` or `losses.dpo`, pairs from `data.selection.rso_sample` (https://arxiv.org/abs/2309.06657).
  RS-DPO: `losses.dpo`, pairs from `data.pairing.rs_dpo_pairs` (https://arxiv.org/abs/2402.10038).
  TR-DPO: any loss, the reference by `train.ema_every`, rate 0.6 (soft) or 1 (hard) (https://arxiv.org/abs/2404.09656).
  sDPO: `losses.dpo`, the reference and the optimizer renewed at each part of the data (https://arxiv.org/abs/2403.19270).
  EMA reference: any loss, the reference by `train.ema` after each update (https://arxiv.org/abs/2404.10719).
  SPIN: `losses.dpo`, rejected sides and reference from the last iterate (https://arxiv.org/abs/2401.01335).
  BPO: any loss, the policy that sampled as the reference (https://arxiv.org/abs/2406.12168).
  Online DPO (OAIF): `losses.dpo` or `losses.dpo_soft` on pairs of the policy's own (https://arxiv.org/abs/2402.04792).
  Online IPO: `losses.ipo` or `losses.ipo_soft` on pairs of the policy's own (https://arxiv.org/abs/2403.08635).
  IPO-MD: `losses.ipo_soft` on pairs sampled from `models.mixture` (https://arxiv.org/abs/2403.08635).
  SPPO: `losses.sppo`, win rates by `rewards.win_rates` (https://arxiv.org/abs/2405.00675).
  Iterated DPO, hybrid batches: `losses.dpo`, weights by `data.selection.hybrid_weights` (https://arxiv.org/abs/2405.07863).
  P3O: `losses.p3o_joint` on two samples of a prompt, extra old_logp and reward (https://arxiv.org/abs/2310.00212).
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank, without_empty
from alignax.algorithms._frozen import frozen_params
from alignax.logprobs import predicted, score
from alignax.losses._sides import log_ratio
from alignax.losses.extras import needed, needs_whole_batch, reads_reference
from alignax.types import Array, LossFn, Mean, Model, Params, Response, Scalar, Term

COMPUTED = ("log_sum_p2", "forward_kl")  # extras that come from the models; all others come with the batch


class Rows(NamedTuple):
    """Rows of their own beside the pairs."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T]
    ref_logp: Array | None = None  # float32 [B, T]


class Batch(NamedTuple):
    """Pairs; index 0 of the second axis is the chosen completion, 1 the rejected one."""

    tokens: Array  # int32 [B, 2, T]
    segments: Array  # int32 [B, 2, T], 0 is padding
    mask: Array  # [B, 2, T], the completions' tokens
    ref_logp: Array | None = None  # float32 [B, 2, T]; None: computed in the step from frozen["reference"], if any
    weights: Array | None = None  # float32 [B], pair weights; a filler pair weighs 0
    extra: dict[str, Array] | None = None  # [B, 2] or [B, 2, T], or [B] of the pair: what the loss names beside these
    degraded: Rows | None = None  # the chosen completions after a degraded prompt (mDPO)


def whole(response: Response) -> Array:
    """The log-ratio of a whole response: the implicit reward over beta of DPO and most others."""
    return log_ratio(response)


def with_kl(response: Response) -> Array:
    """The log-ratio and the KL on its way: the implicit reward over beta of TDPO."""
    return log_ratio(response) + jnp.sum(jnp.where(response.mask != 0, response.extra["forward_kl"], 0.0), axis=-1)


def average(response: Response) -> Array:
    """The average log-probability of a token: the implicit reward over beta of SimPO, ORPO and AlphaPO."""
    return response.mean


def make_loss(
    model: Model,
    *,
    loss: Callable[..., Array] = losses.dpo,
    nll_weight: Scalar | None = None,
    nll_mean: Callable[..., Mean] = reduce.token_mean,
    nll_over_prompt: bool = False,
    reward: Callable[[Response], Array] = whole,
) -> LossFn:
    """Makes the loss function mean(loss(chosen, rejected, **hyper)) + nll_weight * NLL(chosen), over pairs.

    Args:
      model: the model to train.
      loss: any `loss(chosen: Response, rejected: Response, *, ...) -> [B]`; its hyperparameters come from `hyper`.
      nll_weight: of the supervised summand, unless `hyper` says otherwise; None for none.
      nll_mean: its mean: over tokens (TRL), or `reduce.sequence_sum` (CPO as published), `reduce.sequence_mean`.
      nll_over_prompt: whether it counts the prompt's tokens too, as ORPO's own code and TRL do.
      reward: implicit reward over beta, for the metrics.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `frozen` is `{"reference": params}`, or
      None where the batch brings `ref_logp` or the loss needs no reference (`losses.without_reference`). Metrics:
      `rewards/chosen`, `rewards/rejected`, `rewards/margins` (beta times `reward`), `rewards/accuracies` (a tie counts
      as wrong), `logps/chosen`, `logps/rejected`, the means of computed extras (`kl/chosen`, `kl/rejected` of TDPO),
      and `dropped/empty`, the share of pairs that weigh nothing since one side has no tokens.
      A loss that needs the whole batch (AOT) is refused with micro-batches and under pmap.
    """
    parameters = inspect.signature(loss).parameters
    default_beta = parameters["beta"].default if "beta" in parameters else 1.0
    required = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty} - {"weights"}

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        batch, empty = without_empty(batch)
        batch, hyper = blank(batch), dict(hyper)
        weight = hyper.pop("nll_weight", nll_weight)
        chosen, rejected = sides(model, params, batch, frozen, needed(loss), whole_rows=nll_over_prompt)
        if chosen.ref_logp is None and reads_reference(loss):
            raise ValueError(
                "preference: the loss reads a reference, and there is none; expected frozen={'reference': params} or "
                "batch.ref_logp (zeros for none at all); a loss that reads none says so by losses.without_reference"
            )
        if missing := sorted(required - set(hyper)):
            raise ValueError(
                f"preference: the loss needs {missing}, and hyper holds {sorted(hyper)}; losses.kto_pair has its "
                "own by make_update(statistics=preference.make_statistics(model))"
            )
        options = {"weights": batch.weights} if needs_whole_batch(loss) else {}
        pairs = reduce.batch_mean(loss(chosen, rejected, **options, **hyper), batch.weights)
        terms = {"pairs": Term(1.0, pairs)}
        if weight is not None:
            mask = predicted(batch.segments[:, 0]) if nll_over_prompt else chosen.mask
            nll = nll_mean(losses.cross_entropy(chosen.logp, mask), mask, batch.weights)
            terms["nll"] = Term(weight, nll)
        metrics = pair_metrics(chosen, rejected, batch.weights, hyper.get("beta", default_beta), reward)
        return terms, metrics | {"dropped/empty": empty}

    loss_fn.whole_batch = needs_whole_batch(loss)  # pyright: ignore[reportFunctionMemberAccess]
    return loss_fn


def make_statistics(model: Model) -> Callable[..., dict[str, Mean]]:
    """Makes `statistics(params, batch, frozen, hyper)` of `losses.kto_pair` for `alignax.train.make_update`.

    `kl_chosen` and `kl_rejected`: the mean log-ratio of each side over the whole batch.
    """

    def statistics(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]) -> dict[str, Mean]:
        batch = blank(without_empty(batch)[0])
        chosen, rejected = sides(model, params, batch, frozen)
        return {
            "kl_chosen": reduce.batch_mean(whole(chosen), batch.weights),
            "kl_rejected": reduce.batch_mean(whole(rejected), batch.weights),
        }

    return statistics


def logprobs(model: Model, params: Params, batch: Batch) -> Array:
    """Log-probabilities `[B, 2, T]` of both sides: for `ref_logp` ahead of training, or for evaluation."""
    return _scores(model, params, batch, (), None, batch.mask)["logp"]


def sides(
    model: Model, params: Params, batch: Batch, frozen: Any, names: tuple[str, ...] = (), *, whole_rows: bool = False
) -> tuple[Response, Response]:
    """The chosen and the rejected `Response` of every pair, with the extras of these names.

    Args:
      model, params, frozen: as for the loss function.
      batch: pairs.
      names: the entries of `Response.extra` to provide.
      whole_rows: whether `logp` also holds the prompts' tokens, which the mask leaves out.

    Raises:
      ValueError: when an extra is neither computed nor in the batch, or `frozen` holds no reference.
    """
    reference = None if frozen is None else frozen_params(frozen, "reference", "preference: ", " or None")
    mask = None if whole_rows else batch.mask
    want = tuple(name for name in COMPUTED if name in names)
    if batch.ref_logp is None and "forward_kl" in want:
        want += ("ref_logp",)  # of the same pass
    found = _scores(model, params, batch, want, reference, mask)
    ref_logp = found.pop("ref_logp", batch.ref_logp)
    if ref_logp is None and reference is not None:
        ref_logp = jax.lax.stop_gradient(_scores(model, reference, batch, (), None, mask)["logp"])
    logp = found.pop("logp")
    extra = found | _given(model, params, batch, reference, names)

    def side(i: int) -> Response:
        ref = None if ref_logp is None else ref_logp[:, i]
        own = {name: x if x.ndim == 1 or name.startswith("degraded_") else x[:, i] for name, x in extra.items()}
        return Response(logp[:, i], ref, batch.mask[:, i], own)

    return side(0), side(1)


def pair_metrics(
    chosen: Response,
    rejected: Response,
    weights: Array | None,
    beta: Scalar,
    reward: Callable[[Response], Array] = whole,
) -> dict[str, Mean]:
    """The field's metrics of a batch of pairs, as `Mean`s."""
    reward_chosen, reward_rejected = beta * reward(chosen), beta * reward(rejected)
    values = {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/margins": reward_chosen - reward_rejected,
        "rewards/accuracies": (reward_chosen > reward_rejected).astype(jnp.float32),
        "logps/chosen": chosen.sum,
        "logps/rejected": rejected.sum,
    }
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if "forward_kl" in side.extra:
            values[f"kl/{name}"] = jnp.sum(jnp.where(side.mask != 0, side.extra["forward_kl"], 0.0), axis=-1)
    return {name: reduce.batch_mean(jax.lax.stop_gradient(x), weights) for name, x in values.items()}


def _scores(model, params, batch: Batch, want: tuple[str, ...], reference, mask: Array | None) -> dict[str, Array]:
    """`score` of both sides as rows of one batch: {"logp": [B, 2, T], ...}."""
    chex.assert_shape([batch.tokens, batch.segments, batch.mask], (None, 2, None))
    tokens, segments = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments))
    mask = None if mask is None else mask.reshape(tokens.shape)
    scores = score(model, params, tokens, segments, mask=mask, want=want, reference=reference if want else None)
    return {name: getattr(scores, name).reshape(batch.tokens.shape) for name in ("logp", *want)}


def _given(model, params, batch: Batch, reference, names: tuple[str, ...]) -> dict[str, Array]:
    """The extras that come with the batch, and those of its degraded rows."""
    given = dict(batch.extra or {})
    if batch.degraded is not None:
        rows = batch.degraded

        def logp(weights):
            return score(model, weights, rows.tokens, rows.segments, mask=rows.mask).logp

        ref_logp = rows.ref_logp
        if ref_logp is None and reference is not None:
            ref_logp = jax.lax.stop_gradient(logp(reference))
        given |= {"degraded_logp": logp(params), "degraded_ref_logp": ref_logp, "degraded_mask": rows.mask}
    known = {name: x for name, x in given.items() if x is not None}
    if missing := set(names) - set(COMPUTED) - set(known):
        raise ValueError(
            f"preference: the loss needs {sorted(missing)}, and batch.extra holds {sorted(batch.extra or {})}; "
            "expected them there (those of degraded prompts come from batch.degraded and a reference)"
        )
    return {name: known[name] for name in names if name not in COMPUTED}
