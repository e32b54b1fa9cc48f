"""Single answers (C.7, C.8 of preference.md) and several candidates of a prompt (B.2, B.3, C.14, C.15)."""

import jax.numpy as jnp
import numpy as np
from vectors.common import floats, response

from alignax import losses, reduce


def of_all(loss, expected):
    """Each example's loss, and the mean."""
    yield loss, expected["per_example"]
    yield reduce.batch_mean(loss).value(), expected["loss"]


def answers(x):
    return response(x["policy_logps"], x["ref_logps"]), jnp.asarray(x["labels"])


def kto(x, hyper, expected):
    kl = losses.mismatched_kl(response(x["policy_kl_logps"], x["ref_kl_logps"])).value()
    yield jnp.maximum(kl, 0.0), expected["kl"]
    yield from of_all(losses.kto(*answers(x), kl, **hyper), expected)


def apo_zero_unpaired(x, hyper, expected):
    yield from of_all(losses.apo_zero_unpaired(*answers(x), **hyper), expected)


def bco(x, hyper, expected):
    batch = losses.mean_reward(answers(x)[0], **hyper)
    delta, _ = losses.bco_delta(x["running_mean"], x["running_count"], batch)
    yield delta, expected["delta"]
    yield from of_all(losses.bco(*answers(x), delta, **hyper), expected)


def bco_udm_weight(x, hyper, expected):
    (probability,) = floats(x, "prob_desirable")
    limits = {"low": hyper["min_density_ratio"], "high": hyper["max_density_ratio"]}
    yield losses.udm_weights(probability, **limits), expected["weights"]


def ranks(x):
    """Ranks from rankings: `ranking[k]` is the candidate at place k."""
    return jnp.asarray(np.argsort(x["ranking"], axis=1) + 1)


def kwise_pairwise(x, hyper, expected):
    assert not hyper
    (rewards,) = floats(x, "rewards")
    loss = losses.kwise(rewards, jnp.asarray(x["ranks"]), jnp.asarray(x["valid_mask"]))
    yield from of_all(loss, expected)


def plackett_luce(x, hyper, expected):
    assert hyper == {"reduction": "sum_over_positions"}
    (scores,) = floats(x, "scores")
    yield from of_all(losses.plackett_luce(scores, ranks(x), jnp.ones(scores.shape, bool)), expected)


def plackett_luce_topm(x, hyper, expected):
    (scores,) = floats(x, "scores")
    yield from of_all(losses.plackett_luce(scores, ranks(x), jnp.ones(scores.shape, bool), top=hyper["m"]), expected)


def best_of_k_softmax(x, hyper, expected):
    assert not hyper
    (scores,) = floats(x, "scores")
    yield from of_all(losses.best_of_k(scores, jnp.asarray(x["best"]), jnp.ones(scores.shape, bool)), expected)


def rated(x):
    logp, ref_logp, rewards = floats(x, "policy_logps", "ref_logps", "scores")
    return logp - ref_logp, rewards, jnp.ones(logp.shape, bool)


def exo_reward(x, hyper, expected):
    loss = losses.exo_reward(*rated(x), beta=hyper["beta_pi"], reward_temperature=hyper["beta_r"])
    yield from of_all(loss, expected)


def infonca(x, hyper, expected):
    loss = losses.infonca(*rated(x), beta=hyper["beta"], temperature=hyper["reward_temperature"])
    yield from of_all(loss, expected)


def nca(x, hyper, expected):
    loss = losses.nca(*rated(x), beta=hyper["beta"], temperature=hyper["reward_temperature"])
    yield from of_all(loss, expected)


def dpo_plackett_luce(x, hyper, expected):
    logp, ref_logp = floats(x, "policy_logps", "ref_logps")
    loss = losses.plackett_luce_dpo(logp - ref_logp, ranks(x), jnp.ones(logp.shape, bool), **hyper)
    yield from of_all(loss, expected)


PREFERENCE = {
    function.__name__: function
    for function in (
        kto,
        apo_zero_unpaired,
        bco,
        bco_udm_weight,
        kwise_pairwise,
        plackett_luce,
        plackett_luce_topm,
        best_of_k_softmax,
        exo_reward,
        infonca,
        nca,
        dpo_plackett_luce,
    )
}
