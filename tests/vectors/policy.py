"""Policy losses and off-policy corrections (sections B1-B21 of online.md)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import MEANS, floats, response

from alignax import corrections, losses, reduce
from alignax.types import Response


def spread(x, mask):
    """One number a row, on each of its tokens."""
    return jnp.broadcast_to(jnp.asarray(x, jnp.float32)[:, None], mask.shape)


def reduced(loss, mean, logp, *rest, **hyper):
    """Value and gradient of mean(loss(logp, ...)), the mask last."""
    return jax.value_and_grad(lambda logp: mean(loss(logp, *rest, **hyper), rest[-1]).value())(logp)


def values(loss, x, hyper, expected, *, mean, **ours):
    """Loss and, where it is expected, gradient, of `seq_adv` or `adv`."""
    logp, old_logp, mask = floats(x, "logp", "old_logp", "mask")
    advantages = spread(x["seq_adv"], mask) if "seq_adv" in x else floats(x, "adv")[0]
    value, gradient = reduced(loss, mean, logp, old_logp, advantages, mask, **ours)
    yield value, expected["loss"]
    if "grad_logp" in expected:
        yield gradient, expected["grad_logp"]


def row_ratios(ratio, x):
    """A ratio of whole rows, of a function of (logp, old_logp, mask) that has it on each token; column 0 counts."""
    return ratio(*floats(x, "logp", "old_logp", "mask"))[:, 0]


def clips(hyper):
    return {"clip_low": hyper["eps_low"], "clip_high": hyper["eps_high"]}


def reinforce_loss(x, hyper, expected):
    logp, target, baseline, mask = floats(x, "logp", "returns", "baseline", "mask")
    arguments = (logp, jnp.zeros_like(logp), target - baseline, mask)
    value, gradient = reduced(losses.reinforce, MEANS[hyper["agg"]], *arguments)
    yield value, expected["loss"]
    yield gradient, expected["grad_logp"]


def rloo_loss(x, hyper, expected):
    logp, old_logp, ref_logp, scores, mask = floats(x, "logp", "old_logp", "ref_logp", "scores", "mask")
    kl = jnp.sum(losses.k1(old_logp, ref_logp, mask), axis=1)
    yield kl, expected["kl_seq"]
    rewards = scores - hyper["beta"] * kl
    yield rewards, expected["rewards"]
    group = hyper["group_size"]
    grouped = rewards.reshape(-1, group)
    advantages = ((group * grouped - jnp.sum(grouped, axis=1, keepdims=True)) / (group - 1)).reshape(-1)
    yield advantages, expected["advantages"]
    yield row_ratios(corrections.sequence_ratio, x), expected["ratio"]
    eps = {"clip_low": hyper["clip_eps"], "clip_high": hyper["clip_eps"]}
    arguments = (logp, old_logp, spread(advantages, mask), mask)
    value, gradient = reduced(losses.rloo, reduce.sequence_mean, *arguments, **eps)
    yield value, expected["loss"]
    yield gradient, expected["grad_logp"]


def a2c_loss(x, hyper, expected):
    logp, values, target, entropy, mask = floats(x, "logp", "values", "returns", "entropy", "mask")
    weights = {"value_weight": hyper["vf_coef"], "entropy_weight": hyper["ent_coef"]}

    def part(entropy=entropy, **weights):
        return reduce.token_mean(losses.a2c(logp, values, target, entropy, mask, **weights), mask).value()

    policy = part(value_weight=0.0, entropy_weight=0.0)
    yield policy, expected["policy_loss"]
    yield part(value_weight=1.0, entropy_weight=0.0) - policy, expected["value_loss"]
    yield policy - part(value_weight=0.0, entropy_weight=1.0), expected["entropy"]
    yield part(**weights), expected["loss"]


def grpo_loss(x, hyper, expected):
    seq_adv, logp, mask = floats(x, "seq_adv", "logp", "mask")
    old_logp, ref_logp = (logp if x[name] is None else floats(x, name)[0] for name in ("old_logp", "ref_logp"))
    constant = functools.partial(reduce.constant_mean, constant=hyper.get("norm_const"))
    mean = {**MEANS, "seq-sum-norm": constant}[hyper["agg"]]

    def loss(logp, old_logp, advantages, mask):
        kl = losses.k3(logp, ref_logp, mask)
        if hyper.get("unbiased_kl"):
            kl *= losses.importance_ratio(logp, old_logp, mask)
        return losses.ppo_clip(logp, old_logp, advantages, mask, **clips(hyper)) + hyper["beta"] * kl

    value, gradient = reduced(loss, mean, logp, old_logp, spread(seq_adv, mask), mask)
    yield value, expected["loss"]
    yield gradient, expected["grad_logp"]
    if "kl_k3_mean" in expected:
        yield reduce.token_mean(losses.k3(logp, ref_logp, mask), mask).value(), expected["kl_k3_mean"]


def gspo_loss(x, hyper, expected):
    yield row_ratios(corrections.geometric_ratio, x), expected["seq_ratio"]
    yield from values(losses.gspo, x, hyper, expected, mean=reduce.sequence_mean, **clips(hyper))


def gspo_token_loss(x, hyper, expected):
    yield from values(losses.gspo_token, x, hyper, expected, mean=reduce.sequence_mean, **clips(hyper))


def cispo_loss(x, hyper, expected):
    low = hyper["ratio_min"]
    bounds = {"ratio_max": hyper["ratio_max"]} | ({} if low is None else {"ratio_min": low})
    yield from values(losses.cispo, x, hyper, expected, mean=MEANS[hyper["agg"]], **bounds)
    if low is not None:
        eps = {"clip_low": 1 - low, "clip_high": hyper["ratio_max"] - 1}
        yield from values(losses.cispo_range, x, hyper, expected, mean=MEANS[hyper["agg"]], **eps)


def gmpo_loss(x, hyper, expected):
    eps = {"clip_low": hyper["log_clip_low"], "clip_high": hyper["log_clip_high"]}
    logp, old_logp, mask = floats(x, "logp", "old_logp", "mask")
    advantages = spread(x["seq_adv"], mask)
    coefficient = losses.gmpo(logp, old_logp, advantages, mask, **eps)[:, 0] / -advantages[:, 0]
    yield coefficient, expected["coef"]
    yield from values(losses.gmpo, x, hyper, expected, mean=reduce.sequence_mean, **eps)


def sapo_loss(x, hyper, expected):
    tau = {"tau_positive": hyper["tau_pos"], "tau_negative": hyper["tau_neg"]}
    yield from values(losses.sapo, x, hyper, expected, mean=reduce.sequence_mean, **tau)


def vespo_loss(x, hyper, expected):
    shape = {"power_positive": hyper["k_pos"], "decay_positive": hyper["lambda_pos"]}
    shape |= {"power_negative": hyper["k_neg"], "decay_negative": hyper["lambda_neg"]}
    logp, old_logp, mask = floats(x, "logp", "old_logp", "mask")
    advantages = spread(x["seq_adv"], mask)
    weight = losses.vespo(logp, old_logp, advantages, mask, **shape) / jnp.where(mask != 0, -advantages * logp, 1.0)
    yield weight[:, 0], expected["phi"]
    yield from values(losses.vespo, x, hyper, expected, mean=MEANS[hyper["agg"]], **shape)


def luspo_loss(x, hyper, expected):
    yield from values(losses.luspo, x, hyper, expected, mean=reduce.sequence_mean, **clips(hyper))


def p3o_sides(x):
    """Responses of one token each, whose reference says 0."""
    return [
        response(
            x[f"logratio_{i}"],
            [0.0] * len(x[f"logratio_{i}"]),
            old_logp=np.array(x.get(f"old_logratio_{i}", x[f"logratio_{i}"]))[:, None],
            reward=np.array(x[f"reward_{i}"]),
        )
        for i in (1, 2)
    ]


def p3o_joint_loss(x, hyper, expected):
    sides = p3o_sides(x)
    knobs = {"kl_weight": hyper["kl_coef"], "clip": hyper["clip_eps"], "ratio_clip": hyper["ratio_clip"]}
    gap = losses.p3o_gap(*sides, kl_weight=hyper["kl_coef"])
    yield gap, expected["q_diff"]

    def loss(logps, **more):
        moved = [side._replace(logp=logp) for side, logp in zip(sides, logps, strict=True)]
        return losses.p3o_joint(*moved, **knobs | more)

    logps = [side.logp for side in sides]
    yield 2 * loss(logps), expected["per_pair"]  # the half is in ours
    value, gradients = jax.value_and_grad(lambda logps: reduce.batch_mean(loss(logps)).value())(logps)
    yield value, expected["loss"]
    for gradient, i in zip(gradients, (1, 2), strict=True):
        yield gradient[:, 0], expected[f"grad_logratio_{i}"]
    # unclipped, the gradient by the first side is -q p / 2
    wide = jax.grad(lambda logps: jnp.sum(loss(logps, clip=1e3)))(logps)
    yield -2 * wide[0][:, 0] / gap, expected["rho"]


def p3o_separate_loss(x, hyper, expected):
    """The gap is a reward without KL, and the weight of an old pair the bound that it is clipped to."""

    def side(logp, i):
        old = jnp.asarray(x[f"old_logp_{i}"], jnp.float32)
        reward = jnp.asarray([x["q_diff"] * (i == 1)], jnp.float32)
        return Response(logp, None, jnp.ones(logp.shape), {"old_logp": old, "reward": reward})

    def loss(logps):
        sides = [side(logp, i) for logp, i in zip(logps, (1, 2), strict=True)]
        knobs = {"kl_weight": 0.0, "clip": hyper["clip_eps"], "ratio_clip": x["rho"]}
        return reduce.batch_mean(losses.p3o_separate(*sides, **knobs, tokens=5.0)).value()

    value, gradients = jax.value_and_grad(loss)(floats(x, "logp_1", "logp_2"))
    yield value, expected["loss"]
    for gradient, i in zip(gradients, (1, 2), strict=True):
        yield gradient, expected[f"grad_logp_{i}"]


def p3o_shift_invariance(x, hyper, expected):
    for name, shift in (("q_diff", 0.0), ("q_diff_shifted", x["shift"])):
        rewards = {f"reward_{i}": np.array(x[f"reward_{i}"]) + shift for i in (1, 2)}
        yield losses.p3o_gap(*p3o_sides({**x, **rewards}), kl_weight=hyper["kl_coef"]), expected[name]


def logps(x):
    return floats(x, "train_logp", "rollout_logp", "mask")


def truncated_is_weights(x, hyper, expected):
    """The raw weights are those without a cap; statistics are theirs, over tokens."""
    level = hyper["level"]
    weigh = {"token": corrections.truncated_is_token, "sequence": corrections.truncated_is_sequence}[level]
    raw = {"token": corrections.token_ratio, "sequence": corrections.sequence_ratio}[level](*logps(x))
    mask = logps(x)[-1]
    yield weigh(*logps(x), cap=hyper["cap"]), expected["truncated"]
    if "raw" not in expected:
        return
    yield raw, expected["raw"]
    yield reduce.token_mean(raw, mask).value(), expected["mean_raw"]
    yield reduce.token_mean((raw > hyper["cap"]).astype(float), mask).value(), expected["frac_high"]
    if level == "token":
        measured = corrections.mismatch_metrics(*logps(x), cap=hyper["cap"])
        found = {name: value.value() for name, value in measured.items()}
        yield found["is_ratio_mean"], expected["mean_raw"]
        yield found["is_ratio_above_cap"], expected["frac_high"]
        yield corrections.ess(found["is_ratio_mean"], found["is_ratio_square"]), expected["ess_fraction"]


def masked_is_weights(x, hyper, expected):
    yield corrections.sequence_ratio(*logps(x))[:, 0], expected["seq_ratio"]
    weights = corrections.masked_is_sequence(*logps(x), low=hyper["low"], high=hyper["high"])
    yield weights[:, 0], expected["weights"]
    yield (weights[:, 0] > 0).astype(float), expected["keep"]


def geometric_rejection(x, hyper, expected):
    yield corrections.geometric_ratio(*logps(x))[:, 0], expected["geo_ratio"]
    yield corrections.geometric_rejection(*logps(x), **hyper)[:, 0], expected["keep"]


def icepop_weights(x, hyper, expected):
    yield corrections.icepop(*logps(x), **hyper), expected


def offpolicy_metrics(x, hyper, expected):
    names = {"k3_kl": "k3", "train_ppl": "train_perplexity", "rollout_ppl": "rollout_perplexity"}
    names |= {"chi2_seq": "chi2_sequence", "logp_absdiff_mean": "logp_diff_mean", "logp_absdiff_max": "logp_diff_max"}
    measured = corrections.mismatch_metrics(*logps(x))
    for name, value in expected.items():
        yield measured[names.get(name, name)].value(), value


def decoupled_ppo_loss(x, hyper, expected):
    logp, prox, behaviour, advantages, mask = floats(x, "logp", "prox_logp", "behavior_logp", "adv", "mask")

    def loss(logp, prox, advantages, mask):
        weights = corrections.truncated_is_token(prox, behaviour, mask, cap=hyper["is_cap"])
        return weights * losses.ppo_clip(logp, prox, advantages, mask, **clips(hyper))

    value, gradient = reduced(loss, MEANS[hyper["agg"]], logp, prox, advantages, mask)
    yield value, expected["loss"]
    yield gradient, expected["grad_logp"]


def off_policy_sequence_mask(x, hyper, expected):
    logp, sampled, mask = floats(x, "logp", "sampling_logp", "mask")
    kept = corrections.off_policy_mask(logp, sampled, spread(x["seq_adv"], mask), mask, **hyper)
    yield kept, expected["keep"]
    yield -jnp.log(corrections.geometric_ratio(logp, sampled, mask)[:, 0]), expected["avg_kl"]


def reinforce_is_loss(x, hyper, expected):
    loss = {"token": losses.reinforce_is_token, "sequence": losses.reinforce_is_sequence}[hyper["level"]]
    renamed = {**x, "old_logp": x["rollout_logp"]}
    yield from values(loss, renamed, hyper, expected, mean=MEANS[hyper["agg"]], cap=hyper["cap"])


ONLINE = {
    function.__name__: function
    for function in (
        reinforce_loss,
        rloo_loss,
        a2c_loss,
        grpo_loss,
        gspo_loss,
        gspo_token_loss,
        cispo_loss,
        gmpo_loss,
        sapo_loss,
        vespo_loss,
        luspo_loss,
        p3o_joint_loss,
        p3o_separate_loss,
        p3o_shift_invariance,
        truncated_is_weights,
        masked_is_weights,
        geometric_rejection,
        icepop_weights,
        offpolicy_metrics,
        decoupled_ppo_loss,
        off_policy_sequence_mask,
        reinforce_is_loss,
    )
}
