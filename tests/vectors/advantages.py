"""Advantages of groups and sequences, and DAPO's filter (sections B2-B4, B13-B14 of online.md)."""

import jax.numpy as jnp
import numpy as np
from vectors.common import floats

from alignax import advantages, returns, rewards


def grouped(x, hyper, name="rewards"):
    """[N, ...] as [B, G, ...]; NaN stays NaN."""
    x = jnp.asarray(np.array(x[name], np.float32))
    return x.reshape(-1, hyper["group_size"], *x.shape[1:])


def rloo_advantages(x, hyper, expected):
    yield advantages.leave_one_out(grouped(x, hyper)).ravel(), expected


def grpo_advantages(x, hyper, expected):
    spread = {"eps": hyper["eps"], "ddof": hyper["ddof"]}
    function, hyperparameters = {
        "group": (advantages.group_relative, spread),
        "batch": (advantages.group_relative_batch, spread),
        "none": (advantages.group_centred, {}),
    }[hyper["scale"]]
    yield function(grouped(x, hyper), **hyperparameters).ravel(), expected


def remax_advantages(x, hyper, expected):
    token_rewards, greedy, mask = floats(x, "token_rewards", "greedy_scores", "mask")
    yield advantages.remax(token_rewards, greedy, mask), expected["advantages"]
    yield returns.discounted_returns(token_rewards, mask), expected["returns"]


def reinforce_pp_advantages(x, hyper, expected):
    token_rewards, mask = floats(x, "token_rewards", "mask")
    yield advantages.reinforce_plus_plus(token_rewards, mask, **hyper), expected["advantages"]
    yield returns.discounted_returns(token_rewards, mask, gamma=hyper["gamma"]), expected["returns"]


def reinforce_pp_baseline_advantages(x, hyper, expected):
    mask = grouped(x, hyper, "mask")
    result = advantages.reinforce_plus_plus_baseline(
        grouped(x, hyper, "scores"), mask, ddof=hyper["ddof"], eps=hyper["eps"]
    )
    yield result.reshape(-1, mask.shape[2]), expected


def opo_advantages(x, hyper, expected):
    yield advantages.opo(grouped(x, hyper, "scores"), grouped(x, hyper, "lengths")).ravel(), expected


def zero_variance_filter(x, hyper, expected):
    keep = advantages.informative_groups(grouped(x, hyper))
    yield keep.astype(int), expected["keep_group"]
    yield jnp.mean(1.0 - keep), expected["frac_zero_std"]


def multi_reward_advantages(x, hyper, expected):
    function = {
        "sum_then_normalize": advantages.multi_reward_sum,
        "normalize_then_sum": advantages.multi_reward_normalised,
    }[hyper["mode"]]
    yield function(grouped(x, hyper), jnp.asarray(x["weights"]), eps=hyper["eps"]).ravel(), expected


def grpo_process_advantages(x, hyper, expected):
    most = max(map(len, x["step_rewards"]))
    steps = np.full((1, len(x["step_rewards"]), most), np.nan, np.float32)
    ends = np.zeros(steps.shape, np.int32)
    for g, (found, at) in enumerate(zip(x["step_rewards"], x["step_end_index"])):
        steps[0, g, : len(found)], ends[0, g, : len(found)] = found, at
    mask = np.arange(max(x["lengths"])) < np.array(x["lengths"])[:, None]
    arrays = (jnp.asarray(value) for value in (steps, ends, mask[None]))
    yield advantages.group_relative_process(*arrays, **hyper)[0], expected


def soft_overlong_penalty(x, hyper, expected):
    (lengths,) = floats(x, "lengths")
    lmax, cache, factor = hyper["max_len"], hyper["cache"], hyper["factor"]
    yield rewards.soft_overlong(lengths, max_length=lmax, cache=cache, factor=factor), expected


ONLINE = {
    function.__name__: function
    for function in (
        rloo_advantages,
        grpo_advantages,
        remax_advantages,
        reinforce_pp_advantages,
        reinforce_pp_baseline_advantages,
        opo_advantages,
        zero_variance_filter,
        multi_reward_advantages,
        grpo_process_advantages,
        soft_overlong_penalty,
    )
}
