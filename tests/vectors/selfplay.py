"""Self-play, Nash learning and online preference optimisation (section C of online.md), preference models (B.6)."""

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import floats, response

from alignax import losses, models, reduce, rewards, train
from alignax.sampling import transforms


def sppo_win_rates(x, hyper, expected):
    (scores,) = floats(x, "scores")
    rate = rewards.win_rates(scores[None], **hyper)[0]
    yield rate, expected["win_rate"]
    if "pairwise" in expected:
        pairwise = rewards.preference_matrix(scores[None])
        yield pairwise[0], expected["pairwise"]
        yield rewards.mean_win_rates(pairwise, **hyper)[0], expected["win_rate"]
        yield jnp.argmax(rate), expected["best"]
        yield jnp.argmin(rate), expected["worst"]


def nash_md_pg_loss(x, hyper, expected):
    logp, ref_logp, preference, mask = floats(x, "logp", "ref_logp", "pref_prob", "mask")
    form = {"causal": losses.nash_md, "sequence": losses.nash_md_sequence, "trl": losses.nash_md_trl}[hyper["kl_form"]]

    def total(logp):
        return reduce.sequence_sum(form(logp, ref_logp, preference, mask, kl_weight=hyper["tau"]), mask).value()

    yield total(logp), expected["loss"]
    yield jax.grad(total)(logp), expected["grad_logp"]


def geometric_mixture_logits(x, hyper, expected):
    logits = models.geometric_mixture_logits(*floats(x, "policy_logits", "ref_logits"), **hyper)
    yield jax.nn.log_softmax(logits), expected["log_probs"]
    yield jax.nn.softmax(logits), expected["probs"]


def online_ipo_loss(x, hyper, expected):
    preference = np.array(x["pref_prob_1"])

    def total(logp_1):
        second = response(x["logp_2"], x["ref_logp_2"])
        first = response(x["logp_1"], x["ref_logp_1"], preference=preference)._replace(logp=logp_1[:, None])
        if hyper["soft"]:
            return jnp.mean(losses.ipo_soft(first, second, beta=hyper["tau"]))
        won, lost = (losses.ipo(*pair, beta=hyper["tau"]) for pair in ((first, second), (second, first)))
        return jnp.mean(jnp.where(preference > 0.5, won, lost))

    (logp_1,) = floats(x, "logp_1")
    yield total(logp_1), expected["loss"]
    yield jax.grad(total)(logp_1), expected["grad_logp_1"]


def online_dpo_soft_loss(x, hyper, expected):
    first = response(x["logp_1"], x["ref_logp_1"], preference=x["pref_prob_1"])
    second = response(x["logp_2"], x["ref_logp_2"], preference=1 - np.array(x["pref_prob_1"]))
    yield jnp.mean(losses.dpo_soft(first, second, **hyper)), expected["loss"]
    yield jnp.mean(losses.dpo_soft(second, first, **hyper)), expected["loss"]  # the order does not matter


def xpo_loss(x, hyper, expected):
    wins = np.array(x["policy_sample_chosen"]) == 1

    def total(log_ref_sample):
        def one(b):
            def side(name, flag):
                logp = floats(x, f"logp_{name}")[0][b : b + 1]
                return response([0.0], x[f"ref_logp_{name}"][b : b + 1], from_reference=[flag])._replace(
                    logp=(log_ref_sample[b : b + 1] if flag else logp)[:, None]
                )

            sides = side("policy_sample", 0.0), side("ref_sample", 1.0)
            return losses.xpo(*(sides if wins[b] else sides[::-1]), **hyper)

        return jnp.mean(jnp.concatenate([one(b) for b in range(len(wins))]))

    (log_ref_sample,) = floats(x, "logp_ref_sample")
    yield total(log_ref_sample), expected["loss"]
    yield jax.grad(total)(log_ref_sample), expected["grad_logp_ref_sample"]


def mixed(policy, reference, weight):
    """policy^(1 - weight) reference^weight, normalised."""
    return jax.nn.softmax(models.geometric_mixture_logits(jnp.log(policy), jnp.log(reference), mix=weight))


def nash_md_tabular_step(x, hyper, expected):
    """Exact on one token: from the mixture, one exponential step along the preference over it."""
    policy, mu, matrix = floats(x, "pi", "mu", "P")
    opponent = mixed(policy, mu, hyper["eta"] * hyper["tau"])
    yield opponent, expected["mixture"]
    yield jax.nn.softmax(jnp.log(opponent) + hyper["eta"] * matrix @ opponent), expected["pi_next"]


def regularized_nash(x, hyper, expected):
    """Where the policy gradient against the policy itself is zero: KL in, preference out."""
    mu, matrix = floats(x, "mu", "P")
    best, tau = jnp.asarray(expected["pi_star"]), hyper["tau"]
    response_to_itself = jax.nn.softmax(jnp.log(mu) + matrix @ best / tau)
    yield response_to_itself, expected["pi_star"]
    yield jnp.max(jnp.abs(response_to_itself - best)), expected["fixed_point_residual"]
    tokens = jnp.arange(3)

    def value(logits):  # every symbol as a row of one token, weighted by its probability
        logp, ones = jax.nn.log_softmax(logits)[tokens][:, None], jnp.ones((3, 1))
        loss = losses.nash_md(logp, jnp.log(mu)[:, None], matrix @ best, ones, kl_weight=tau)
        return jnp.sum(best * loss[:, 0])

    yield jax.grad(value)(jnp.log(best)), np.zeros(3)


def sppo_tabular_step(x, hyper, expected):
    """The policy at which SPPO's regression is exact: log pi' / pi = eta (P - 1/2) up to the normaliser."""
    policy, matrix = floats(x, "pi", "P")
    yield jax.nn.softmax(jnp.log(policy) + hyper["eta"] * matrix @ policy), expected


def truncated_sampler_logprobs(x, hyper, expected):
    logits, temperature = jnp.asarray(x["logits"], jnp.float32)[None], jnp.array([hyper["temperature"]])
    gap = transforms.gaps(logits, temperature)
    filters = {"top_k": jnp.array([hyper["top_k"]]), "top_p": jnp.array([hyper["top_p"]]), "min_p": jnp.zeros(1)}
    limit = transforms.gap_limit(gap, **filters)
    yield jax.nn.log_softmax(jnp.where(gap <= limit[:, None], -gap, -jnp.inf))[0], expected


def pairrm_aggregate(x, hyper, expected):
    (matrix,) = floats(x, "logit_matrix")
    scores = rewards.pairwise_scores(matrix[None])[0]
    yield scores, expected["scores"]
    yield 1 + jnp.argsort(jnp.argsort(-scores)), expected["ranks"]


def pairwise_symmetric_prob(x, hyper, expected):
    ab, ba = floats(x, "logit_ab", "logit_ba")
    yield rewards.symmetric_preference(ab, ba), expected["p_mean_logit"]
    yield rewards.symmetric_preference_mean(ab, ba), expected["p_mean_prob"]
    matrix = jnp.array([[[0.0, ab], [ba, 0.0]]])
    yield rewards.preference_matrix(rewards.pairwise_scores(matrix))[0, 0, 1], expected["p_trl_soft_judge"]


def tr_dpo_update(x, hyper, expected):
    yield train.ema(*floats(x, "ref_param", "policy_param"), rate=hyper["alpha"]), expected["new_ref"]


ONLINE = {
    function.__name__: function
    for function in (
        sppo_win_rates,
        nash_md_pg_loss,
        geometric_mixture_logits,
        online_ipo_loss,
        online_dpo_soft_loss,
        xpo_loss,
        nash_md_tabular_step,
        regularized_nash,
        sppo_tabular_step,
        truncated_sampler_logprobs,
    )
}
PREFERENCE = {function.__name__: function for function in (pairrm_aggregate, pairwise_symmetric_prob, tr_dpo_update)}
