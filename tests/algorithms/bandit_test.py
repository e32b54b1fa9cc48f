"""Every on-policy method on one bandit: reward less beta KL(policy || reference), whose optimum is known.

One prompt, one token of five arms, a table of logits for a policy; 512 samples a rollout, two updates on each (the
second one off-policy), Adam whose rate goes to 0. With the KL in the reward, r - beta log(pi / ref) is the same for all
arms at the optimum ref exp(r / beta) / Z, so that every advantage is 0 there, divided by a standard deviation or not.
With the KL in the loss it balances the advantage, and three published choices end elsewhere, which is known too: GRPO's
standard deviation scales the reward, a mean that holds the sample itself shrinks it by (G - 1) / G, and k3 holds the
policy by the KL of the other direction. With one token all reductions are one, so it is advantages, losses and
estimators of the KL that are tried here.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import advantages, losses
from alignax.types import Response

ARMS, SAMPLES, ROLLOUTS, BETA = 5, 512, 120, 0.7
RNG = np.random.default_rng(0)
REFERENCE = np.log(RNG.dirichlet(np.full(ARMS, 3.0)))
REWARDS = RNG.normal(size=ARMS)
ONE = jnp.ones((SAMPLES, 1))


def tilted(beta):
    """ref exp(r / beta) / Z."""
    odds = np.exp(REFERENCE + REWARDS / beta)
    return odds / odds.sum()


def distance(policy, other):
    """Total variation."""
    return np.abs(policy - other).sum() / 2


def groups(function, size=8):
    """Advantages [N, 1] by groups of that size."""
    return lambda paid, old_logp: function(paid.reshape(-1, size)).reshape(-1, 1)


def opo(paid):
    return advantages.opo(paid, jnp.ones(paid.shape))


def greedy(paid, old_logp):
    """The likeliest arm is the greedy answer; some sample drew it."""
    return advantages.remax(paid, jnp.broadcast_to(paid[jnp.argmax(old_logp), 0], (SAMPLES,)), ONE)


def reinforce_plus_plus_baseline(paid, old_logp):
    return advantages.reinforce_plus_plus_baseline(paid.reshape(-1, 8), ONE.reshape(-1, 8, 1)).reshape(-1, 1)


def return_itself(paid, old_logp):
    return paid


centred = groups(advantages.group_centred)
relative = groups(advantages.group_relative)
unshrunk = groups(advantages.leave_one_out)
whitened = lambda paid, old_logp: advantages.reinforce_plus_plus(paid, ONE)  # noqa: E731

# method -> advantages of rewards that hold the KL, and the policy loss
IN_REWARD = {
    "reinforce": (return_itself, losses.reinforce),
    "reinforce, token weights": (centred, losses.reinforce_is_token),
    "reinforce, sequence weights": (centred, losses.reinforce_is_sequence),
    "rloo": (groups(advantages.leave_one_out, 4), losses.rloo),
    "opo": (groups(opo), losses.ppo_clip),
    "remax": (greedy, losses.reinforce),
    "reinforce++": (whitened, losses.ppo_clip),
    "reinforce++ with a baseline": (reinforce_plus_plus_baseline, losses.ppo_clip),
    "grpo": (relative, losses.ppo_clip),
    "grpo, batch": (groups(advantages.group_relative_batch), losses.ppo_clip),
    "dr. grpo": (centred, losses.ppo_clip),
    "dapo": (relative, partial(losses.ppo_clip, clip_high=0.28)),
    "ppo, dual clip": (whitened, partial(losses.ppo_clip, dual_clip=3.0)),
    "ppo, penalty": (whitened, losses.ppo_penalty),
    "ppo, hybrid": (whitened, losses.ppo_hybrid),
    "gspo": (relative, losses.gspo),
    "gspo, token": (relative, losses.gspo_token),
    "luspo": (relative, losses.luspo),
    "gmpo": (relative, losses.gmpo),
    "cispo": (relative, losses.cispo),
    "cispo, range": (relative, losses.cispo_range),
    "sapo": (relative, losses.sapo),
    "vespo": (relative, losses.vespo),
}


def shaped(rewards, old_logp, ref_logp):
    return rewards - BETA * losses.k1(old_logp, ref_logp, ONE)


def in_reward(make_advantages, policy_loss):
    def loss(logp, old_logp, ref_logp, rewards, value):
        advantage = make_advantages(shaped(rewards, old_logp, ref_logp), old_logp)
        return jnp.mean(policy_loss(logp, old_logp, advantage, ONE))

    return loss


def in_loss(make_advantages, kl, beta=BETA):
    """The KL beside the policy loss: `kl(logp, old_logp, ref_logp)`."""

    def loss(logp, old_logp, ref_logp, rewards, value):
        policy = losses.ppo_clip(logp, old_logp, make_advantages(rewards, old_logp), ONE)
        return jnp.mean(policy + beta * kl(logp, old_logp, ref_logp))

    return loss


def estimator(kl):
    return lambda logp, old_logp, ref_logp: kl(logp, ref_logp, ONE)


def unbiased(logp, old_logp, ref_logp):
    return losses.importance_ratio(logp, old_logp, ONE) * losses.k3(logp, ref_logp, ONE)


def a2c(logp, old_logp, ref_logp, rewards, value):
    return jnp.mean(losses.a2c(logp, value * ONE, shaped(rewards, old_logp, ref_logp), ONE, ONE))


def p3o(pairwise):
    """One half of the samples against the other."""

    def loss(logp, old_logp, ref_logp, rewards, value):
        first, second = (
            Response(logp[half], ref_logp[half], ONE[half], {"old_logp": old_logp[half], "reward": rewards[half, 0]})
            for half in (slice(None, SAMPLES // 2), slice(SAMPLES // 2, None))
        )
        return jnp.mean(pairwise(first, second, kl_weight=BETA))

    return loss


REACH_THE_OPTIMUM = {name: in_reward(*parts) for name, parts in IN_REWARD.items()} | {
    "a2c": a2c,
    "p3o, joint": p3o(losses.p3o_joint),
    "p3o, separate": p3o(losses.p3o_separate),
    "k2 in the loss": in_loss(unshrunk, estimator(losses.k2)),
    "k3 straight through in the loss": in_loss(unshrunk, estimator(losses.k3_straight_through)),
    "unbiased k3 in the loss": in_loss(unshrunk, unbiased),
}
END_ELSEWHERE = {
    "k3 in the loss": in_loss(unshrunk, estimator(losses.k3)),
    "a group of eight": in_loss(centred, estimator(losses.k2)),
    "a standard deviation": in_loss(groups(advantages.group_relative, SAMPLES), estimator(losses.k2), beta=2.0),
}


@functools.cache
def solutions():
    """Method -> where it ends, one program for all."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 2 * ROLLOUTS))

    def solve(loss):
        def rollout(carry, key):
            params, state = carry
            logits = jax.lax.stop_gradient(params[0])
            arms = jax.random.categorical(key, logits, shape=(SAMPLES,))
            rewards, ref_logp = (jnp.asarray(x, jnp.float32)[arms][:, None] for x in (REWARDS, REFERENCE))
            old_logp = jax.nn.log_softmax(logits)[arms][:, None]

            def update(carry, _):
                params, state = carry
                gradient = jax.grad(
                    lambda p: loss(jax.nn.log_softmax(p[0])[arms][:, None], old_logp, ref_logp, rewards, p[1])
                )(params)
                change, state = optimizer.update(gradient, state)
                return (optax.apply_updates(params, change), state), None

            return jax.lax.scan(update, (params, state), length=2)

        params = (jnp.asarray(REFERENCE, jnp.float32), jnp.zeros(()))
        keys = jax.random.split(jax.random.key(0), ROLLOUTS)
        return jax.nn.softmax(jax.lax.scan(rollout, (params, optimizer.init(params)), keys)[0][0][0])

    solve_all = jax.jit(lambda: {name: solve(loss) for name, loss in (REACH_THE_OPTIMUM | END_ELSEWHERE).items()})
    return {name: np.asarray(policy, np.float64) for name, policy in solve_all().items()}


@pytest.mark.parametrize("name", REACH_THE_OPTIMUM)
def test_the_optimum_is_reached(name):
    assert distance(solutions()[name], tilted(BETA)) < 0.005


def test_the_optimum_is_far_from_where_all_begin_and_from_that_of_another_beta():
    assert distance(np.exp(REFERENCE), tilted(BETA)) > 0.2
    assert distance(tilted(1.1 * BETA), tilted(BETA)) > 0.01


def test_k3_in_the_loss_holds_by_the_other_kl():
    """E[r] - beta KL(ref || pi) has its maximum at beta ref / (c - r), the c that makes it a distribution."""
    low, high = REWARDS.max() + 1e-9, REWARDS.max() + 10
    for _ in range(100):
        c = (low + high) / 2
        total = (BETA * np.exp(REFERENCE) / (c - REWARDS)).sum()
        low, high = (c, high) if total > 1 else (low, c)
    expected = BETA * np.exp(REFERENCE) / (c - REWARDS)
    assert distance(solutions()["k3 in the loss"], expected) < 0.005
    assert distance(expected, tilted(BETA)) > 0.04


def test_a_mean_over_the_group_shrinks_the_reward():
    """A sample is compared with a mean of which it is an eighth itself: 7 / 8 of the advantage over the others."""
    assert distance(solutions()["a group of eight"], tilted(BETA * 8 / 7)) < 0.005
    assert distance(tilted(BETA * 8 / 7), tilted(BETA)) > 0.015


def test_a_standard_deviation_scales_the_reward():
    """ref exp(r / (beta std)) / Z, std that of the rewards under this very policy: what is learned makes it smaller.

    With a smaller beta there is no such policy but a single arm.
    """
    std, beta = 1.0, 2.0
    for _ in range(200):
        expected = tilted(beta * std)
        std = (std + np.sqrt(expected @ REWARDS**2 - (expected @ REWARDS) ** 2)) / 2
    assert distance(solutions()["a standard deviation"], expected) < 0.01
    assert distance(expected, tilted(beta)) > 0.1
