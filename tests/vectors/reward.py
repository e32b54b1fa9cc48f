"""Reward and preference models (sections B.1 and B.4-B.11 of preference.md)."""

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import floats

from alignax import losses, reduce, rewards


def bradley_terry(x, hyper, expected):
    chosen, rejected = floats(x, "chosen_rewards", "rejected_rewards")
    margin = jnp.asarray(x.get("margin", 0.0), jnp.float32)
    preference = jnp.asarray(x.get("prob_chosen", 1 - hyper.get("label_smoothing", 0.0)), jnp.float32)

    def loss(chosen):
        return losses.bradley_terry(chosen, rejected, margin=margin, preference=preference)

    centring = losses.reward_centering(chosen, rejected)
    total = reduce.batch_mean(loss(chosen) + hyper.get("center_coef", 0.0) * centring).value()
    yield total, expected["loss"]
    slope = jax.grad(lambda chosen: jnp.sum(loss(chosen)))(chosen)
    d = np.subtract(x["chosen_rewards"], x["rejected_rewards"]) - x.get("margin", 0.0)
    p = x.get("prob_chosen", 1 - hyper.get("label_smoothing", 0.0))
    yield slope, 1 / (1 + np.exp(-d)) - p
    if "per_example" in expected:
        yield loss(chosen), expected["per_example"]
    if "accuracy" in expected:
        yield jnp.mean((chosen > rejected).astype(jnp.float32)), expected["accuracy"]
        yield jnp.mean(chosen - rejected), expected["margin"]


def llama2_reward_combine(x, hyper, expected):
    safety, helpful, prompt = floats(x, "safety_prob", "helpful_prob", "is_safety_prompt")
    yield rewards.llama2_scores(safety, helpful, prompt, **hyper), expected["whitened"]
    # the rule in two steps: safety below the threshold overrides, and so does a prompt that asks for it
    selected = rewards.lexicographic(safety, jnp.where(prompt != 0, safety, helpful), threshold=hyper["threshold"])
    yield selected, expected["selected"]
    yield rewards.baseline_reward(selected, least=1e-6), expected["logit"]


def pairrm_loss(x, hyper, expected):
    left, right, sign = floats(x, "left_scores", "right_scores", "sign")
    yield jnp.mean(losses.preference_model(left, right, sign > 0)), expected["loss"]
    one = jnp.mean(left - right, axis=1)  # the logit is the mean over tasks; of a consistent model, in both orders
    yield jnp.mean(losses.symmetric_preference_model(one, -one, sign[:, 0] > 0)), expected["loss"]


def generative_rm_good_bad(x, hyper, expected):
    good, bad = (jnp.asarray([x[f"logp_{name}"]]) for name in ("good", "bad"))
    yield rewards.good_score(good)[0], expected["p_good_raw"]
    yield rewards.good_bad_score(good, bad)[0], expected["p_good_normalised"]
    yield losses.cross_entropy(good[None], jnp.ones((1, 1)))[0, 0], expected["loss_if_label_good"]
    yield losses.reward_binary(good - bad, jnp.ones(1))[0], expected["loss_if_label_good_restricted"]


def generative_rm_ab(x, hyper, expected):
    a, b, swapped_a, swapped_b = (jnp.asarray([x[f"logp_{letter}_order{i}"]]) for i in (1, 2) for letter in "AB")
    yield rewards.ab_preference(a, b, swapped_a, swapped_b)[0], expected["p_avg"]
    first = rewards.good_bad_score(a, b)
    yield first[0], expected["p_order1"]
    yield rewards.good_bad_score(swapped_b, swapped_a)[0], expected["p_order2_flipped"]
    yield rewards.baseline_reward(first)[0], expected["reward_vs_baseline_logit"]


def pmp(x, hyper, expected):
    good, bad = floats(x, "good_rewards", "bad_rewards")
    nll = jnp.full(good.shape, x["good_lm_nll"])
    yield jnp.mean(losses.pmp(good, bad, nll, mu=hyper["mu"])), expected["loss"]
    yield jnp.mean(losses.pmp(good, bad, nll, mu=0.0)), expected["pm"]


def pmp_stackexchange_score(x, hyper, expected):
    found = [rewards.stack_exchange_score(*row) for row in zip(x["upvotes"], x["accepted"], strict=True)]
    yield np.array(found), expected["scores"]


def prm_aggregate(x, hyper, expected):
    steps, mask = floats(x, "step_probs", "mask")
    yield rewards.process_product(steps, mask), expected["prod"]
    for name in ("min", "last", "mean"):
        yield getattr(rewards, f"process_{name}")(steps, mask), expected[name]


def prm_bce(x, hyper, expected):
    logits, labels, mask = floats(x, "step_logits", "labels", "mask")
    yield reduce.token_mean(losses.process_reward(logits, labels, mask), mask).value(), expected["loss"]


def prm_mc_labels(x, hyper, expected):
    correct = jnp.asarray(x["rollout_correct"]) != 0
    yield rewards.monte_carlo_hard(correct), expected["hard"]
    yield rewards.monte_carlo_soft(correct), expected["soft"]


def reward_ensemble(x, hyper, expected):
    (scores,) = floats(x, "scores_models_by_items")
    yield rewards.ensemble_mean(scores), expected["mean"]
    yield rewards.ensemble_min(scores), expected["wco_min"]
    for ddof in (0, 1):
        penalised = rewards.ensemble_variance_penalised(scores, penalty=hyper["uwo_lambda"], ddof=ddof)
        yield penalised, expected[f"uwo_var_ddof{ddof}"]
    yield rewards.ensemble_lower_bound(scores, deviations=hyper["lcb_k"]), expected["lcb_std_ddof1"]


def rm_regression(x, hyper, expected):
    score, target = floats(x, "pred", "target")
    yield reduce.batch_mean(losses.reward_mse(score, target)).value(), expected["mse"]
    huber = losses.reward_huber(score, target, delta=hyper["huber_delta"])
    yield reduce.batch_mean(huber).value(), expected["huber"]


PREFERENCE = {
    **dict.fromkeys(
        ("bradley_terry", "bradley_terry_margin", "bradley_terry_centered", "bradley_terry_soft"), bradley_terry
    ),
    **{
        function.__name__: function
        for function in (
            llama2_reward_combine,
            pairrm_loss,
            generative_rm_good_bad,
            generative_rm_ab,
            pmp,
            pmp_stackexchange_score,
            prm_aggregate,
            prm_bce,
            prm_mc_labels,
            reward_ensemble,
            rm_regression,
        )
    },
}
