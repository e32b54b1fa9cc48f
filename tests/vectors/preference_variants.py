"""Pairwise losses beyond two log-ratios (C.1, C.6, C.10 to C.13, C.20 to C.24 and C.26 to C.28 of preference.md)."""

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import floats, pair, response

from alignax import losses, reduce
from alignax.losses._logistic import log1mexp as _log1mexp
from alignax.losses.dynamic_beta import dynamic_beta, log_weight
from alignax.losses.f_divergence import alpha_reward
from alignax.losses.reference_free import log_odds
from alignax.types import Response

NLL = {
    "token_mean": reduce.token_mean,
    "sequence_sum_mean": reduce.sequence_sum,
    "sequence_mean": reduce.sequence_mean,
}


def nll(chosen, reduction):
    """The supervised summand that an algorithm adds, `nll_weight` times."""
    return NLL[reduction](losses.cross_entropy(chosen.logp, chosen.mask), chosen.mask).value()


def per_pair(loss, expected):
    """A loss [B] against what a vector has of it: per row, as a mean."""
    if "per_example" in expected:
        yield loss, expected["per_example"]
    yield jnp.mean(loss), expected["loss"]


def of_pairs(function):
    """Vectors of a loss that is all in its two sides."""
    return lambda x, hyper, expected: per_pair(function(*pair(x), **hyper), expected)


def told(x, name, chosen, rejected):
    """A pair whose sides are told these numbers."""
    numbers = (jnp.asarray(v, jnp.float32) for v in (chosen, rejected))
    return (side._replace(extra={name: v}) for side, v in zip(pair(x), numbers, strict=True))


def dpo_margin(x, hyper, expected):
    yield from per_pair(losses.odpo(*told(x, "margin", x["margin"], x["margin"]), **hyper), expected)


def of_rewards(function):
    def vectors(x, hyper, expected):
        gap = np.array(x["gt_reward_margin"])
        sides = told(x, "reward", gap + 0.25, 0 * gap + 0.25)
        yield from per_pair(function(*sides, beta=hyper["beta"], eta=hyper["gt_reward_scale"]), expected)

    return vectors


def slic_hf(x, hyper, expected):
    chosen, rejected = pair(x)
    options = {"delta": hyper["delta"], "target_weight": hyper["lambda"]}
    target = chosen._replace(extra={"target_logp": jnp.asarray(x["target_logps"], jnp.float32)})
    yield from per_pair(losses.slic_hf(target, rejected, **options), expected)
    if x["target_logps"] == x["chosen_logps"]:
        yield from per_pair(losses.slic_hf(chosen, rejected, **options), expected)
    if "calibration" in expected:
        hinge = losses.slic_hf(chosen, rejected, delta=hyper["delta"], target_weight=0.0)
        yield jnp.mean(hinge), expected["calibration"]
        rest = losses.slic_hf(target, rejected, **options) - hinge
        yield jnp.mean(rest) / hyper["lambda"], expected["regularization"]


def orpo(x, hyper, expected):
    chosen, rejected = response(x["chosen_avg_logps"]), response(x["rejected_avg_logps"])
    ratio = log_odds(chosen) - log_odds(rejected)
    yield ratio, expected["log_odds"]
    yield losses.orpo(chosen, rejected, odds_weight=1.0), expected["or_loss_per_example"]
    loss = losses.orpo(chosen, rejected, odds_weight=hyper["lambda"])
    yield x["chosen_nll"] + jnp.mean(loss), expected["loss"]
    if "log_odds_ratio" in expected:
        yield -jnp.mean(loss) / hyper["lambda"], expected["log_odds_ratio"]
        yield jnp.mean(ratio), expected["log_odds_chosen"]


def log1mexp(x, hyper, expected):
    yield _log1mexp(*floats(x, "x")), expected["y"]


def supervised(function, *names):
    """Vectors of a loss with the NLL of the chosen side beside it; names: hyperparameters that are the loss's own."""

    def vectors(x, hyper, expected):
        chosen, rejected = pair(x)
        preference = function(chosen, rejected, **{name: hyper[name] for name in names})
        if "preference_per_example" in expected:
            yield preference, expected["preference_per_example"]
        yield jnp.mean(preference), expected["preference"]
        yield nll(chosen, hyper["nll_reduction"]), expected["nll"]
        yield jnp.mean(preference) + hyper["cpo_alpha"] * nll(chosen, hyper["nll_reduction"]), expected["loss"]

    return vectors


def of_averages(function):
    """Vectors of SimPO and AlphaPO, with the rewards that are logged."""

    def vectors(x, hyper, expected):
        yield from per_pair(function(*pair(x), **hyper), expected)
        for side, response_ in zip(("chosen", "rejected"), pair(x), strict=True):
            if "metrics" in expected:
                reward = hyper["beta"] * alpha_reward(response_.mean, hyper.get("alpha", 0.0))
                yield jnp.mean(reward), expected["metrics"][f"rewards/{side}"]
        if "alpha" not in hyper:
            ratio = {**hyper, "gamma_beta_ratio": hyper["gamma"] / hyper["beta"], "gamma": None}
            yield from per_pair(function(*pair(x), **ratio), expected)

    return vectors


def ld_dpo(x, hyper, expected):
    def side(name):
        logp, ref_logp, mask = floats(x, f"policy_{name}_token_logps", f"ref_{name}_token_logps", f"{name}_mask")
        return Response(logp, ref_logp, mask)

    chosen, rejected = side("chosen"), side("rejected")
    loss = losses.ld_dpo if hyper["apply_to_ref"] else losses.ld_dpo_policy
    yield jnp.mean(loss(chosen, rejected, beta=hyper["beta"], alpha=hyper["ld_alpha"])), expected["loss"]
    # the margin, by way of the loss: -log sigmoid(z) has one z
    z = -jnp.log(jnp.expm1(loss(chosen, rejected, beta=1.0, alpha=hyper["ld_alpha"])))[0]
    policy, reference = (expected[f"{name}_chosen"][0] - expected[f"{name}_rejected"][0] for name in ("policy", "ref"))
    yield z, policy - reference


def dpop(x, hyper, expected):
    chosen, rejected = pair(x)
    yield from per_pair(losses.dpop(chosen, rejected, beta=hyper["beta"], penalty_weight=hyper["lambda"]), expected)
    if "penalty" in expected:  # lambda max(0, -x_chosen): how far one unit of beta moves a large loss
        far = rejected._replace(logp=chosen.logp + 50.0, ref_logp=chosen.ref_logp)
        moved = losses.dpop(chosen, far, beta=1.0, penalty_weight=hyper["lambda"]) - losses.dpo(chosen, far, beta=1.0)
        yield moved, expected["penalty"]


def rpo(x, hyper, expected):
    chosen, rejected = pair(x)
    if "per_example" in expected:
        loss = losses.rpo(chosen, rejected, beta=hyper["beta"], alpha=hyper["alpha"])
        yield from per_pair(loss, expected)
        dpo = losses.dpo(chosen, rejected, beta=hyper["beta"])
        yield jnp.mean(dpo) + hyper["alpha"] * nll(chosen, hyper["nll_reduction"]), expected["loss"]
        return
    dpo = jnp.mean(losses.dpo(chosen, rejected, beta=hyper["beta"]))
    yield dpo, expected["dpo"]
    yield nll(chosen, hyper["nll_reduction"]), expected["nll"]
    yield dpo + hyper["alpha"] * nll(chosen, hyper["nll_reduction"]), expected["loss"]


def mpo(x, hyper, expected):
    chosen, rejected = pair(x)
    preference, quality, supervised_weight = hyper["weights"]
    mixed = losses.mixture({losses.dpo: preference, losses.bco_pair: quality})
    for loss in (losses.mpo, mixed):
        total = jnp.mean(loss(chosen, rejected, beta=hyper["beta"])) + supervised_weight * nll(chosen, "token_mean")
        yield total, expected["loss"]


def mdpo(x, hyper, expected):
    chosen, rejected = pair(x)
    degraded = response(x["cond_rejected_chosen_logps"], x["ref_cond_rejected_chosen_logps"])
    arrays = {f"degraded_{name}": v for name, v in zip(("logp", "ref_logp", "mask"), degraded, strict=False)}
    yield from per_pair(losses.mdpo(chosen._replace(extra=arrays), rejected, **hyper), expected)


def diffusion_dpo(x, hyper, expected):
    sides = ("w", "l")
    if "noise" in x:
        noise = jnp.asarray(x["noise"], jnp.float32)
        predictions = floats(x, *(f"{model}_pred_{s}" for model in ("model", "ref") for s in sides))
        errors = [losses.squared_error(prediction, noise) for prediction in predictions]
    else:
        errors = floats(x, *(f"{model}_err_{s}" for model in ("model", "ref") for s in sides))
    chosen, rejected, ref_chosen, ref_rejected = errors
    loss = losses.diffusion_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=hyper["beta_dpo"])
    yield from per_pair(loss, expected)
    inside = -jnp.log(jnp.expm1(loss))  # of -log sigmoid(inside)
    yield inside, expected["inside"]
    if "implicit_acc" in expected:
        yield jnp.mean((inside > 0).astype(jnp.float32)), expected["implicit_acc"]


def beta_dpo(x, hyper, expected):
    chosen, rejected = pair(x)
    gaps = chosen.sum - chosen.ref_sum - (rejected.sum - rejected.ref_sum)
    mean, std = losses.beta_dpo_moments(x["ema_mean"], x["ema_std"], gaps, momentum=hyper["ema_gamma"])
    yield mean, expected["ema_mean_new"]
    yield std, expected["ema_std_new"]
    yield jnp.exp(log_weight(gaps, mean, std)), expected["sampling_weights"]
    weights = losses.beta_dpo_select(jax.random.key(0), gaps, mean=mean, std=std, ratio=hyper["filter_ratio"])
    statistics = {"gap_mean": mean, "selected_mean": reduce.batch_mean(gaps, weights).value()}
    options = {"beta": hyper["beta0"], "alpha": hyper["a"]}
    yield dynamic_beta(**statistics, **options), expected["beta_used"]
    loss = losses.beta_dpo(chosen, rejected, **statistics, **options)
    yield reduce.batch_mean(loss, weights).value(), expected["loss"]


def beta_dpo_beta(x, hyper, expected):
    selected = jnp.mean(jnp.asarray(x["gap"]))
    yield dynamic_beta(x["ema_mean_new"], selected, beta=hyper["beta0"], alpha=hyper["a"]), expected["beta_used"]


def of_targets(logits, x):
    """Log-probabilities of all tokens and of the targets."""
    logp = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    return logp, jnp.take_along_axis(logp, jnp.asarray(x["targets"])[..., None], axis=-1)[..., 0]


def one_each(logp, ref_logp, mask, **extra):
    """A pair of the first and the second row."""
    rows = (slice(0, 1), slice(1, 2))
    return [Response(logp[i], ref_logp[i], mask[i], {name: v[i] for name, v in extra.items()}) for i in rows]


def tdpo(function):
    def vectors(x, hyper, expected):
        policy, logp = of_targets(x["policy_logits"], x)
        reference, ref_logp = of_targets(x["ref_logits"], x)
        kl, mask = jnp.sum(jnp.exp(reference) * (reference - policy), axis=-1), jnp.asarray(x["mask"])
        chosen, rejected = one_each(logp, ref_logp, mask, forward_kl=kl)
        yield jnp.mean(function(chosen, rejected, **hyper)), expected["loss"]
        ratios = jnp.concatenate([side.sum - side.ref_sum for side in (chosen, rejected)])
        totals = jnp.sum(jnp.where(mask != 0, kl, 0.0), axis=-1)
        yield ratios, expected["logratio"]
        yield totals, expected["seq_kl"]
        for i, name in enumerate(("chosen_reward", "rejected_reward")):
            if name in expected:
                yield hyper["beta"] * (ratios + totals)[i], expected[name]

    return vectors


def wpo(x, hyper, expected):
    vocabulary, logp = of_targets(x["policy_logits"], x)
    expected_logp, mask = jax.nn.logsumexp(2 * vocabulary, axis=-1), jnp.asarray(x["mask"])
    first = np.arange(mask.shape[1]) == 0
    ref_logp = jnp.asarray(np.where(first, np.array(x["ref_seq_logps"])[:, None], 0.0), jnp.float32)
    sides = one_each(logp, ref_logp, mask, log_sum_p2=expected_logp)
    loss = losses.wpo(clamp=hyper["clamp_max"])(*sides, beta=hyper["beta"])
    yield jnp.mean(loss), expected["loss"]
    yield (loss / losses.dpo(*sides, beta=hyper["beta"]))[0], expected["weight"]
    # of one side: the other one's weight is 1 where it is what a sample has on average
    for i, aligned in enumerate(expected["avg_aligned_logps"]):
        even = sides[1 - i]._replace(extra={"log_sum_p2": sides[1 - i].logp})
        both = (sides[0], even) if i == 0 else (even, sides[1])
        yield jnp.log(losses.wpo(clamp=None)(*both) / losses.dpo(*both))[0], aligned


PREFERENCE = {
    "dpo_margin": dpo_margin,
    "slic_hf": slic_hf,
    "orpo": orpo,
    "log1mexp": log1mexp,
    "cpo": supervised(losses.cpo, "beta"),
    "simpo": of_averages(losses.simpo),
    "cpo_simpo": supervised(losses.simpo, "beta", "gamma"),
    "alphapo": of_averages(losses.alphapo),
    "r_dpo": of_pairs(losses.r_dpo),
    "dpo_norm": of_pairs(losses.dpo_average),
    "ld_dpo": ld_dpo,
    "dpop": dpop,
    "rpo": rpo,
    "rpo_bwd_kl": of_rewards(losses.rpo_backward_kl),
    "rpo_fwd_kl": of_rewards(losses.rpo_forward_kl),
    "rpo_sq": of_rewards(losses.rpo_squared),
    "mdpo": mdpo,
    "diffusion_dpo": diffusion_dpo,
    "beta_dpo": beta_dpo,
    "beta_dpo_beta": beta_dpo_beta,
    "tdpo1": tdpo(losses.tdpo1),
    "tdpo2": tdpo(losses.tdpo2),
    "wpo": wpo,
    "mpo": mpo,
}
