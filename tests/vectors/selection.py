"""What to learn from among samples (B22-B23, C8, C11 of online.md; D.1-D.4 of preference.md)."""

import jax.numpy as jnp
import numpy as np

from alignax import reduce
from alignax.data import pairing, selection


def best_of_n(x, hyper, expected):
    best = selection.best_of_n(x["rewards"])
    yield best, expected["index"]
    yield np.take_along_axis(np.array(x["rewards"]), best[:, None], axis=1)[:, 0], expected["value"]


def best_of_n_kl(x, hyper, expected):
    yield selection.best_of_n_kl(x["n"]), expected


def best_of_n_kl_of_one(x, hyper, expected):
    yield selection.best_of_n_kl(hyper["n"]), expected["kl"]


def best_of_n_expected(x, hyper, expected):
    yield [selection.best_of_n_expected(x["rewards"], n) for n in hyper["n"]], expected


def rest_filter(x, hyper, expected):
    yield np.array([selection.rest_filter(x["rewards"], tau) for tau in hyper["thresholds"]], int), expected


def rest_bc_loss(x, hyper, expected):
    keep = selection.rest_filter(x["rewards"], hyper["threshold"]).ravel()
    nll = jnp.asarray(x["nll"], jnp.float32).ravel()
    yield reduce.batch_mean(jnp.where(keep, nll, 0.0)).value(), expected["mean_over_all"]
    yield reduce.batch_mean(nll, jnp.asarray(keep)).value(), expected["mean_over_kept"]


def rso_accept_prob(x, hyper, expected):
    yield selection.rso_accept_probability(x["rewards"], beta=hyper["beta"]), expected


def reward_weighted_weights(x, hyper, expected):
    yield selection.reward_weights(x["rewards"], beta=hyper["beta"]), expected


def select_pairs(x, hyper, expected):
    strategy = {"max_min": pairing.max_min, "max_max": pairing.max_max, "max_min_p": pairing.max_min_penalised}
    options = {name: x[name] for name in ("lengths",) if name in x} | hyper
    pairs = strategy[options.pop("strategy")](x["rewards"], **options)
    yield np.stack([pairs.chosen, pairs.rejected], axis=1), [pair or [-1, -1] for pair in expected]


def hybrid_batch_loss(x, hyper, expected):
    weights = selection.hybrid_weights(x["is_online"], fraction=hyper["online_weight"])
    yield reduce.batch_mean(jnp.asarray(x["loss_per_example"]), jnp.asarray(weights)).value(), expected


def rso_sample(x, hyper, expected):
    options = {"count": hyper["num_samples"], "beta": hyper["beta"]}
    accepted = selection.rso_sample(x["rewards"], iter(x["uniforms"]).__next__, **options)
    yield accepted, [x["candidates"].index(name) for name in expected["accepted"]]
    if "first_pass_accept_prob" in expected:
        chances = selection.rso_accept_probability(x["rewards"], beta=hyper["beta"])
        yield chances, expected["first_pass_accept_prob"]


def rs_dpo_pairs(x, hyper, expected):
    options = {"temperature": hyper["tau"], "threshold": hyper["eta"]}
    yield pairing.rs_dpo_pairs(x["rewards"], **options), expected["pairs_chosen_rejected"]


def tournament_rank(x, hyper, expected):
    strength = x["candidate_strength"]
    found = selection.tournament(lambda i, j: float(strength[i] > strength[j]), len(strength))
    yield found.winner, expected["winner"]
    yield found.pairs, expected["pairs_winner_loser"]
    yield len(found.pairs), expected["num_comparisons"]
    for met, other in zip(found.rounds, expected["rounds"], strict=True):
        yield np.array(met), other


def top_k_over_n(x, hyper, expected):
    yield selection.top_k_over_n(x["rewards"], hyper["k"]), expected["indices"]


ONLINE = {
    function.__name__: function
    for function in (
        best_of_n,
        best_of_n_kl,
        best_of_n_expected,
        rest_filter,
        rest_bc_loss,
        rso_accept_prob,
        reward_weighted_weights,
        select_pairs,
        hybrid_batch_loss,
    )
}
PREFERENCE = {
    "rso_sample": rso_sample,
    "rs_dpo_pairs": rs_dpo_pairs,
    "tournament_rank": tournament_rank,
    "best_of_n_kl": best_of_n_kl_of_one,
    "top_k_over_n": top_k_over_n,
}
