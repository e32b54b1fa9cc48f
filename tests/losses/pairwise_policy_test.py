"""What is particular to P3O: shifts of the rewards, opposite gradients, what is a constant, what adds up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from policies import fixed, sample
from properties import PAIR, Input, Properties, Row, device, pairwise, real
from references import pairwise_policy as references
from references.toys import chain

from alignax import losses, train
from alignax.algorithms import preference
from alignax.losses import needed
from alignax.types import Mean, Response

REWARDS = {f"{side}_reward": Input("B", None, make=real) for side in ("chosen", "rejected")}
SAMPLED = PAIR | {f"{side}_old_logp": Input(mask=f"{side}_mask") for side in ("chosen", "rejected")} | REWARDS
P3O = (losses.p3o_joint, losses.p3o_separate)


def call(loss):
    return pairwise(loss, "old_logp", "reward")


def arrays(seed=0, scale=0.3):
    return device(sample(SAMPLED, seed=seed, scale=scale))


def row(loss, hyper):
    loop = getattr(references, loss.__name__)
    return Row(loss, call(loss), loop, SAMPLED, hyper, fixed(loop, SAMPLED))


@pytest.mark.parametrize("loss", P3O)
def test_a_constant_added_to_both_rewards_changes_nothing(loss):
    x = arrays()

    @jax.jit
    def of(shifts):
        def total(logp):
            shifted = {name: x[name] + shift for name, shift in zip(REWARDS, shifts, strict=True)}
            value = call(loss)({**x, **shifted, "chosen_logp": logp})
            return jnp.sum(value), value

        return jax.value_and_grad(total, has_aux=True)(x["chosen_logp"])

    both, neither, one_side = (jax.tree.map(np.asarray, of(np.float32(shifts))) for shifts in ((7, 7), (0, 0), (7, 0)))
    for found, expected in zip(jax.tree.leaves(both), jax.tree.leaves(neither), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(one_side[0][1] - neither[0][1])) > 0.1


def test_the_gradients_of_the_two_sides_are_opposite():
    """One token a side, so that x is its log-ratio; on the policy itself they are half the gap of the rewards."""
    x = sample(SAMPLED, seed=3, scale=0.3)
    x = {name: value[:, :1] if value.ndim == 2 else value for name, value in x.items()}
    x |= {f"{side}_mask": np.ones((4, 1), bool) for side in ("chosen", "rejected")}
    sides = ("chosen_logp", "rejected_logp")

    @jax.jit
    def gradient(x):
        return jax.grad(lambda logps: jnp.sum(call(losses.p3o_joint)(x | logps)))({name: x[name] for name in sides})

    moved = jax.tree.map(np.asarray, gradient(x))
    np.testing.assert_allclose(moved["chosen_logp"], -moved["rejected_logp"], rtol=1e-6)
    assert np.any(moved["chosen_logp"] != 0)
    still = gradient(x | {name: x[name.replace("logp", "old_logp")] for name in sides} | same_reference(x))
    half = (x["chosen_reward"] - x["rejected_reward"])[:, None] / 2
    np.testing.assert_allclose(still["chosen_logp"], -half, rtol=1e-5)


def same_reference(x):
    """The reference says what the old policy said: no KL."""
    return {f"{side}_ref_logp": x[f"{side}_old_logp"] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("loss", P3O)
def test_only_the_policy_moves(loss):
    x = arrays()
    still = {name: value for name, value in x.items() if value.dtype == jnp.float32 and not name.endswith("n_logp")}
    still.pop("rejected_logp")
    gradients = jax.jit(jax.grad(lambda still: jnp.sum(call(loss)(x | still))))(still)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape), err_msg=name)


def test_no_gap_no_update():
    x = arrays()
    x |= {name: x["chosen_reward"] for name in REWARDS} | same_reference(x)
    x |= {f"{side}_logp": x[f"{side}_old_logp"] for side in ("chosen", "rejected")}
    np.testing.assert_array_equal(call(losses.p3o_joint)(x), np.zeros(4))


def test_separate_clipping_divides_by_all_tokens():
    x = arrays(seed=4)
    lengths = sum(np.sum(np.asarray(x[f"{side}_mask"]), axis=1) for side in ("chosen", "rejected"))
    alone, together = call(losses.p3o_separate)(x), call(losses.p3o_separate)(x, tokens=float(np.mean(lengths)))
    alone, together, lengths = map(np.asarray, (alone, together, lengths))
    np.testing.assert_allclose(np.mean(together), np.sum(alone * lengths) / np.sum(lengths), rtol=1e-5)


def test_what_the_losses_read_beyond_log_probabilities():
    assert {name for loss in P3O for name in needed(loss)} == {"old_logp", "reward"}
    side = Response(jnp.zeros((1, 1)), None, jnp.ones((1, 1)), {"reward": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"p3o_joint: Response.extra holds \['reward'\]; expected 'old_logp'"):
        losses.p3o_joint(side, side)


@pytest.mark.parametrize("loss", P3O)
@pytest.mark.parametrize("hyper, expected", [({"ratio_clip": 0.5}, "ratio_clip >= 1"), ({"scale": 0.0}, "scale > 0")])
def test_hyperparameters_out_of_range_are_refused(loss, hyper, expected):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: .*expected {expected}"):
        call(loss)(arrays(), **hyper)


def count_tokens(params, batch, frozen, hyper):
    """The statistics of `p3o_separate`: tokens of a pair, over the whole batch."""
    return {"tokens": Mean(jnp.sum(batch.mask, dtype=jnp.float32), jnp.asarray(float(len(batch.mask))))}


@pytest.mark.parametrize("loss, statistics", [(losses.p3o_joint, None), (losses.p3o_separate, count_tokens)])
def test_it_drops_into_the_algorithm_of_pairs_and_splits(loss, statistics):
    """Two updates of a Markov chain on pairs that it sampled, in one part and in two."""
    model, rng = chain(), np.random.default_rng(0)
    shape = (4, 2, 7)
    mask = (np.arange(7) >= 2) & (np.arange(7) < rng.integers(4, 8, (4, 2, 1)))
    extra = {"old_logp": rng.normal(size=shape) - 2, "reward": rng.normal(size=(4, 2))}
    batch = preference.Batch(
        *(jnp.asarray(x) for x in (rng.integers(0, 5, shape), np.ones(shape, np.int32), mask, rng.normal(size=shape))),
        extra={name: jnp.asarray(x, jnp.float32) for name, x in extra.items()},
    )
    params, optimizer = jnp.asarray(rng.normal(size=(5, 5)), jnp.float32), optax.sgd(0.1)

    def after(parts):
        loss_fn = preference.make_loss(model, loss=loss)
        update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=parts, statistics=statistics))
        state = train.TrainState.create(params, optimizer)
        for _ in range(2):
            state, metrics = update(state, batch, None, {"kl_weight": 0.05, "clip": 5.0})
        return np.asarray(state.params), metrics["loss"]

    whole = after(1)
    for found, expected in zip(after(2), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(whole[0] - np.asarray(params))) > 1e-3


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "p3o_joint": row(losses.p3o_joint, {"kl_weight": 0.3, "clip": 1.0, "ratio_clip": 3.0, "scale": 2.0}),
        "p3o_separate": row(losses.p3o_separate, {"kl_weight": 0.3, "clip": 0.5, "ratio_clip": 3.0, "scale": 2.0}),
        "p3o_separate_batch": Row(
            losses.p3o_separate,
            call(losses.p3o_separate),
            lambda x, tokens=None, **hyper: references.p3o_separate(x, tokens_per_pair=tokens, **hyper),
            SAMPLED,
            {"tokens": 5.0},
            lambda x, tokens=None: fixed(references.p3o_separate, SAMPLED)(x, tokens_per_pair=tokens),
        ),
        "p3o_gap": Row(
            losses.p3o_gap,
            pairwise(losses.p3o_gap, "reward"),
            references.p3o_gap,
            {name: i._replace(differentiable=False) for name, i in (PAIR | REWARDS).items()},
            {"kl_weight": 0.3},
        ),
    }
