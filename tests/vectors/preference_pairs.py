"""Losses of the two log-ratios of a pair (C of preference.md), and methods that are one of them with another reference.

Gradients here are by the log-probability of a whole answer, which is one token.
"""

import functools

import jax
import jax.numpy as jnp
from vectors.common import floats, pair, response

from alignax import losses, reduce
from alignax.algorithms.preference import pair_metrics

DIVERGENCES = {
    "reverse_kl": losses.f_reverse_kl,
    "forward_kl": losses.f_forward_kl,
    "js": losses.f_jensen_shannon,
}


def check(loss, x, expected, *, metrics_beta=0.1):
    """The loss of every pair, its mean, and the metrics."""
    chosen, rejected = pair(x)
    (weights,) = floats(x, "sample_weight") if "sample_weight" in x else (None,)
    per_example = loss(chosen, rejected)
    yield per_example, expected["per_example"]
    yield reduce.batch_mean(per_example, weights).value(), expected["loss"]
    metrics = pair_metrics(chosen, rejected, weights, metrics_beta)
    for name, value in expected.get("metrics", {}).items():
        yield metrics[name].value(), value


def of(loss):
    """A vector whose hyperparameters have our names."""

    def vector(x, hyper, expected):
        hyper = {name: value for name, value in hyper.items() if name != "reference_free"}
        yield from check(functools.partial(loss, **hyper), x, expected, metrics_beta=hyper["beta"])

    return vector


def dpo_gradient(x, hyper, expected):
    chosen, rejected = pair(x)

    def total(chosen_logp, rejected_logp):
        return jnp.sum(losses.dpo(chosen._replace(logp=chosen_logp), rejected._replace(logp=rejected_logp), **hyper))

    by_chosen, by_rejected = jax.grad(total, (0, 1))(chosen.logp, rejected.logp)
    yield by_chosen[:, 0], expected["dloss_dchosen_per_example"]
    yield by_rejected[:, 0], expected["dloss_drejected_per_example"]


def ipo(x, hyper, expected):
    loss = losses.ipo_average if hyper["length_normalize"] else losses.ipo
    yield from check(functools.partial(loss, beta=hyper["tau"]), x, expected)


def kto_pair(x, hyper, expected):
    """Theirs are 2B terms, chosen then rejected; ours the mean of each pair's two."""
    chosen, rejected = pair(x)
    kl = {name: jnp.mean(side.sum - side.ref_sum) for name, side in (("kl_chosen", chosen), ("kl_rejected", rejected))}
    per_example = losses.kto_pair(chosen, rejected, **kl, **hyper)
    terms, rows = expected["per_example"], len(x["chosen_logps"])
    yield per_example, [(a + b) / 2 for a, b in zip(terms[:rows], terms[rows:])]
    yield reduce.batch_mean(per_example).value(), expected["loss"]
    for name, value in kl.items():
        yield jnp.maximum(value, 0.0), expected[name]


def bco_pair(x, hyper, expected):
    delta = hyper["delta"]
    if isinstance(delta, str):  # "batch mean of all implicit rewards (first step)"
        delta = hyper["beta"] * jnp.mean(jnp.stack([side.sum - side.ref_sum for side in pair(x)]))
        yield delta, expected["delta"]
    yield from check(functools.partial(losses.bco_pair, beta=hyper["beta"], delta=delta), x, expected)


def exo_pref_official(x, hyper, expected):
    loss = functools.partial(losses.exo_official, beta=hyper["beta_pi"], log_epsilon=hyper["log_epsilon"])
    yield from check(loss, x, expected)


def sppo(x, hyper, expected):
    def loss(chosen, rejected):
        sides = (
            side._replace(extra={"win_rate": rate})
            for side, rate in zip((chosen, rejected), floats(x, "win_prob_chosen", "win_prob_rejected"))
        )
        return losses.sppo(*sides, **hyper)

    yield from check(loss, x, expected)


def sorted_rows(loss, upper):
    """Theirs are in the order of quantiles, ours in that of rows: `upper` is what was sorted."""

    def vector(x, hyper, expected):
        chosen, rejected = pair(x)
        order = jnp.argsort(upper(chosen, rejected))
        per_example = loss(chosen, rejected, **hyper)
        yield per_example[order], expected["per_example"]
        yield reduce.batch_mean(per_example).value(), expected["loss"]
        if "sorted_delta" in expected:  # -log sigmoid(beta d), solved for d
            yield -jnp.log(jnp.expm1(per_example[order])) / hyper["beta"], expected["sorted_delta"]

    return vector


def f_dpo(x, hyper, expected):
    if hyper["divergence"] == "alpha":
        divergence = functools.partial(losses.f_alpha, alpha=hyper["alpha"])
    else:
        divergence = DIVERGENCES[hyper["divergence"]]
    yield from check(functools.partial(losses.dpo, beta=hyper["beta"], divergence=divergence), x, expected)


def gpo_generic(x, hyper, expected):
    convex = getattr(losses, f"gpo_{hyper['f']}")
    yield from check(functools.partial(losses.gpo, beta=hyper["beta"], convex=convex), x, expected)


def sppo_loss(x, hyper, expected):
    beta = 1 / hyper["eta"]

    def mean(chosen_logp, rejected_logp):
        chosen = response(x["logp_w"], x["ref_logp_w"], win_rate=x["winrate_w"])._replace(logp=chosen_logp)
        rejected = response(x["logp_l"], x["ref_logp_l"], win_rate=x["winrate_l"])._replace(logp=rejected_logp)
        return reduce.batch_mean(losses.sppo(chosen, rejected, beta=beta)).value()

    logps = [logp[:, None] for logp in floats(x, "logp_w", "logp_l")]
    loss, (by_chosen, by_rejected) = jax.value_and_grad(mean, (0, 1))(*logps)
    yield loss, expected["loss"]
    yield by_chosen[:, 0], expected["grad_logp_w"]
    yield by_rejected[:, 0], expected["grad_logp_l"]


def dpo_against(*names):
    """DPO whose arrays have these names: log-probability and reference's of the chosen side, then of the rejected."""

    def vector(x, hyper, expected):
        chosen, rejected = (response(x[names[i]], x[names[i + 1]]) for i in (0, 2))
        yield reduce.batch_mean(losses.dpo(chosen, rejected, **hyper)).value(), expected["loss"]

    return vector


def online_dpo_loss(x, hyper, expected):
    first_wins = [a >= b for a, b in zip(x["scores_1"], x["scores_2"])]  # of a tie, the first is the chosen one

    def side(first):
        def of(name):
            return [x[f"{name}_{1 if wins == first else 2}"][b] for b, wins in enumerate(first_wins)]

        return response(of("logp"), of("ref_logp"))

    yield reduce.batch_mean(losses.dpo(side(True), side(False), **hyper)).value(), expected["loss"]


ONLINE = {
    "sppo_loss": sppo_loss,
    "spin_loss": dpo_against("logp_real", "opp_logp_real", "logp_gen", "opp_logp_gen"),
    "bpo_dpo_loss": dpo_against("logp_w", "behavior_logp_w", "logp_l", "behavior_logp_l"),
    "online_dpo_loss": online_dpo_loss,
}
PREFERENCE = {
    "dpo": of(losses.dpo),
    "dpo_gradient": dpo_gradient,
    "cdpo": of(losses.dpo),
    "robust_dpo": of(losses.robust_dpo),
    "ipo": ipo,
    "hinge_norm": of(losses.hinge),
    "hinge": of(losses.hinge),
    "kto_pair": kto_pair,
    "bco_pair": bco_pair,
    "apo_zero": of(losses.apo_zero),
    "apo_down": of(losses.apo_down),
    "exo_pair": of(losses.exo_pair),
    "exo_pref_official": exo_pref_official,
    "nca_pair": of(losses.nca_pair),
    "sppo_hard": of(losses.sppo_hard),
    "sppo": sppo,
    "aot": sorted_rows(losses.aot, lambda chosen, rejected: chosen.sum - rejected.sum),
    "aot_unpaired": sorted_rows(losses.aot_unpaired, lambda chosen, rejected: chosen.sum - chosen.ref_sum),
    "discopop": of(losses.discopop),
    "f_dpo": f_dpo,
    "gpo_generic": gpo_generic,
}
