"""What pairwise losses of log-ratios share (a row of PAIRWISE each), and what is particular to losses of the margin."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Properties, Row, pairwise
from references import preference as references

from alignax import losses
from alignax.types import Response

DIVERGENCES = (losses.f_reverse_kl, losses.f_forward_kl, losses.f_jensen_shannon, losses.f_alpha)


def side(x, ref_logp=0.0):
    """Responses of one token each, of these log-ratios: a win rate comes along."""
    logp = np.asarray(x, np.float32)[:, None] + np.float32(ref_logp)
    extra = {"win_rate": np.resize(WIN_RATE, len(x))}
    arrays = (logp, np.full_like(logp, ref_logp), np.ones(logp.shape, bool), extra)
    return Response(*jax.tree.map(jnp.asarray, arrays))


WIN_RATE = np.array([0.9, 0.2, 0.6, 0.5], np.float32)
CHOSEN, REJECTED = np.array([1.0, -1.5, 1.75, 0.25]), np.array([-0.5, 2.0, -2.0, 0.5])


class Pairwise(NamedTuple):
    """What a loss of two log-ratios is known to do."""

    loss: Callable
    same: Callable  # its value where both log-ratios are x
    of_margin: bool = True  # whether it depends on D alone
    divergence: bool = True  # whether f'(e^x) may stand for every x


def softplus(x):
    return math.log1p(math.exp(x))


LOG2 = math.log(2)
PAIRWISE = {
    "dpo": Pairwise(losses.dpo, lambda x: LOG2),
    "cdpo": Pairwise(functools.partial(losses.dpo, label_smoothing=0.2), lambda x: LOG2),
    "robust_dpo": Pairwise(losses.robust_dpo, lambda x: LOG2),
    "hinge": Pairwise(losses.hinge, lambda x: 1.0),
    "ipo": Pairwise(losses.ipo, lambda x: 25.0),
    "ipo_average": Pairwise(losses.ipo_average, lambda x: 25.0),
    "exo_pair": Pairwise(losses.exo_pair, lambda x: -LOG2 - (math.log(0.999) + math.log(1e-3)) / 2),
    "exo_official": Pairwise(losses.exo_official, lambda x: 5 - LOG2),
    "discopop": Pairwise(losses.discopop, lambda x: (1 + LOG2) / 2),
    "gpo_logistic": Pairwise(functools.partial(losses.gpo, convex=losses.gpo_logistic), lambda x: LOG2),
    "gpo_hinge": Pairwise(functools.partial(losses.gpo, convex=losses.gpo_hinge), lambda x: 1.0),
    "gpo_squared": Pairwise(functools.partial(losses.gpo, convex=losses.gpo_squared), lambda x: 1.0),
    "gpo_exponential": Pairwise(functools.partial(losses.gpo, convex=losses.gpo_exponential), lambda x: 1.0),
    "gpo_truncated_quadratic": Pairwise(
        functools.partial(losses.gpo, convex=losses.gpo_truncated_quadratic), lambda x: 1.0
    ),
    "gpo_savage": Pairwise(functools.partial(losses.gpo, convex=losses.gpo_savage), lambda x: 0.25),
    "apo_zero": Pairwise(losses.apo_zero, lambda x: 1.0, of_margin=False, divergence=False),
    "apo_down": Pairwise(
        losses.apo_down, lambda x: 0.5 + 1 / (1 + math.exp(-0.1 * x)), of_margin=False, divergence=False
    ),
    "nca_pair": Pairwise(losses.nca_pair, lambda x: softplus(-0.01 * x) + softplus(0.01 * x), of_margin=False),
    "bco_pair": Pairwise(losses.bco_pair, lambda x: softplus(-0.1 * x) + softplus(0.1 * x), of_margin=False),
    "kto_pair": Pairwise(
        functools.partial(losses.kto_pair, kl_chosen=0.5, kl_rejected=0.5), lambda x: 0.5, of_margin=False
    ),
    "sppo": Pairwise(losses.sppo, lambda x: [(x - 400) ** 2, (x + 300) ** 2], of_margin=False),
    "sppo_hard": Pairwise(losses.sppo_hard, lambda x: 2 * (x**2 + 500**2), of_margin=False),
    "aot": Pairwise(losses.aot, lambda x: LOG2, of_margin=False, divergence=False),
    "aot_unpaired": Pairwise(losses.aot_unpaired, lambda x: LOG2, of_margin=False, divergence=False),
}


def each(holds=lambda case: True):
    """A test for each of the losses of which something holds."""
    cases = {name: case for name, case in PAIRWISE.items() if holds(case)}
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@each(lambda case: case.of_margin)
def test_swapping_the_sides_turns_the_margin_round(case):
    swapped = case.loss(side(REJECTED), side(CHOSEN))
    np.testing.assert_allclose(swapped, case.loss(side(-CHOSEN), side(-REJECTED)), rtol=1e-6)
    zero = np.zeros(4)
    np.testing.assert_allclose(swapped, case.loss(side(REJECTED - CHOSEN), side(zero)), rtol=1e-6)
    assert np.all(swapped != case.loss(side(CHOSEN), side(REJECTED)))


@each()
def test_what_policy_and_reference_share_does_not_matter(case):
    """Every log-ratio stays: adding c to both is another scale of log-probabilities."""
    loss = case.loss(side(CHOSEN), side(REJECTED))
    np.testing.assert_allclose(case.loss(side(CHOSEN, -16.0), side(REJECTED)), loss, rtol=1e-6)
    np.testing.assert_allclose(case.loss(side(CHOSEN), side(REJECTED, -32.0)), loss, rtol=1e-6)


@each()
def test_a_pair_of_the_same_answer(case):
    """Also what training begins with, where the policy is its reference (x = 0)."""
    for x in (0.0, 1.0):
        same = side([x, x], -20.0)
        np.testing.assert_allclose(case.loss(same, same), np.broadcast_to(case.same(x), 2), rtol=2e-6)


@functools.cache
def gradients():
    """Name -> gradients of every loss by the policy and by the reference, one program for all."""
    mask, extra = jnp.asarray(np.ones((4, 1), bool)), side(CHOSEN).extra

    def total(logp, ref_logp, loss):
        chosen, rejected = (Response(logp[i], ref_logp[i], mask, extra) for i in range(2))
        return jnp.sum(loss(chosen, rejected))

    @jax.jit
    def compute(*arrays):
        return {name: jax.grad(total, (0, 1))(*arrays, case.loss) for name, case in PAIRWISE.items()}

    logp, ref_logp = np.float32([CHOSEN, REJECTED])[..., None], np.full((2, 4, 1), -0.5, np.float32)
    return jax.tree.map(np.asarray, compute(logp, ref_logp))


@pytest.mark.parametrize("name", PAIRWISE)
def test_no_gradient_reaches_the_reference(name):
    policy, reference = gradients()[name]
    assert np.any(policy != 0)
    np.testing.assert_array_equal(reference, 0.0)


@each(lambda case: case.divergence)
def test_another_divergence_is_another_log_ratio(case):
    for divergence in DIVERGENCES:
        with_it = case.loss(side(CHOSEN), side(REJECTED), divergence=divergence)
        of_scores = case.loss(*(side(divergence(jnp.asarray(x))) for x in (CHOSEN, REJECTED)))
        np.testing.assert_allclose(with_it, of_scores, rtol=1e-6, err_msg=divergence.__name__)
        assert divergence is losses.f_reverse_kl or np.all(with_it != case.loss(side(CHOSEN), side(REJECTED)))


@each()
def test_finite_far_from_the_reference(case):
    far = np.array([-1e5, -1e4, -200.0, -90.0, -0.0, 90.0, 200.0, 1e4, 1e5], np.float32)
    ratios = np.stack([np.repeat(far, 9), np.tile(far, 9)])

    def run(ratios, beta, divergence):
        def total(ratios):  # ten tokens an answer, as a token's log-probability is floored at -1e4
            tokens, ones = jnp.repeat(ratios[..., None] / 10, 10, axis=2), jnp.ones((81, 10), bool)
            chosen, rejected = (Response(x, jnp.zeros_like(x), ones, {"win_rate": jnp.full(81, 0.7)}) for x in tokens)
            loss = case.loss(chosen, rejected, beta=beta, **({"divergence": divergence} if case.divergence else {}))
            return jnp.sum(loss), loss

        return jax.grad(total, has_aux=True)(ratios)

    divergences = DIVERGENCES if case.divergence else DIVERGENCES[:1]
    run_all = jax.jit(lambda ratios, beta: {d.__name__: run(ratios, beta, d) for d in divergences})
    for beta in (0.01, 0.1, 10.0):
        for divergence, (gradient, loss) in run_all(ratios, beta).items():
            assert np.all(np.isfinite(loss)), (divergence, beta)
            assert np.all(np.isfinite(gradient)), (divergence, beta)


@each()
def test_a_beta_that_is_not_above_0_is_refused(case):
    for beta in (0, -0.1, math.nan, jnp.float32(-1)):
        with pytest.raises(ValueError, match=r"beta=.*expected beta > 0"):
            case.loss(side(CHOSEN), side(REJECTED), beta=beta)


@pytest.mark.parametrize("name", ["dpo", "robust_dpo", "aot", "aot_unpaired"])
@pytest.mark.parametrize("label_smoothing", [0.5, -0.1, 1, math.nan, jnp.float32(0.9)])
def test_label_smoothing_out_of_range_is_refused(name, label_smoothing):
    with pytest.raises(ValueError, match=rf"{name}: label_smoothing=.*expected 0 <= label_smoothing < 0.5"):
        getattr(losses, name)(side(CHOSEN), side(REJECTED), label_smoothing=label_smoothing)


def test_other_numbers_out_of_range_are_refused():
    for label_smoothing in (0, 0.0, -0.1, 0.5):
        with pytest.raises(ValueError, match=r"exo_pair: label_smoothing=.*expected 0 < label_smoothing < 0.5"):
            losses.exo_pair(side(CHOSEN), side(REJECTED), label_smoothing=label_smoothing)
    with pytest.raises(ValueError, match=r"exo_official: log_epsilon=0; expected log_epsilon < 0"):
        losses.exo_official(side(CHOSEN), side(REJECTED), log_epsilon=0.0)
    with pytest.raises(ValueError, match=r"discopop: tau=0; expected tau > 0"):
        losses.discopop(side(CHOSEN), side(REJECTED), tau=0.0)


def test_known_numbers_are_checked_inside_jit_too():
    loss = jax.jit(lambda c, r: losses.dpo(c, r, beta=jnp.float32(0.5), label_smoothing=jnp.float32(0.1)))
    eager = losses.dpo(side(CHOSEN), side(REJECTED), beta=0.5, label_smoothing=0.1)
    np.testing.assert_allclose(loss(side(CHOSEN), side(REJECTED)), eager, rtol=1e-6)


def test_dpo_of_the_other_order_is_more_by_the_logit():
    swapped, straight = (np.asarray(losses.dpo(*pair)) for pair in reversed(both_orders()))
    np.testing.assert_allclose(swapped - straight, 0.1 * (CHOSEN - REJECTED), rtol=1e-5, atol=1e-7)


def test_dpo_keeps_its_digits_where_the_pair_is_right():
    # log(1 + e^-z) = e^-z to float32 at z = 30, where softplus(z) - z is 0
    def loss(logp):
        return losses.dpo(side([0.0])._replace(logp=logp), side([0.0]), beta=1.0)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(np.full((1, 1), 30, np.float32))
    np.testing.assert_allclose([value, -float(gradient[0, 0])], math.exp(-30), rtol=1e-5)


def test_long_answers_keep_the_digits_of_their_log_ratio():
    """Sums of 4096 log-probabilities differ by a few units here, and lose 5e-4 of that when each is rounded."""
    rng = np.random.default_rng(0)
    logp = -rng.gamma(0.5, 2, (2, 4, 4096)).astype(np.float32)
    ref_logp = (logp + rng.normal(0, 0.05, logp.shape)).astype(np.float32)
    x_chosen, x_rejected = (logp.astype(np.float64) - ref_logp).sum(axis=-1)
    sides = (Response(*map(jnp.asarray, arrays), jnp.ones((4, 4096), bool)) for arrays in zip(logp, ref_logp))
    margin = jax.jit(functools.partial(losses.gpo, convex=lambda z: z, beta=1.0))(*sides)
    np.testing.assert_allclose(margin, x_chosen - x_rejected, atol=1e-5)


def test_impossible_tokens_of_both_models_cancel():
    impossible = Response(jnp.full((1, 1), -jnp.inf), jnp.full((1, 1), -jnp.inf), jnp.ones((1, 1)))
    np.testing.assert_allclose(losses.dpo(impossible, side([0.0])), LOG2, rtol=1e-6)


def test_without_a_reference():
    free = Response(jnp.array([[-3.0]]), None, jnp.ones((1, 1)))
    other = Response(jnp.array([[-5.0]]), None, jnp.ones((1, 1)))
    np.testing.assert_allclose(losses.dpo(free, other, beta=0.5), math.log1p(math.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(losses.hinge(free, other, beta=0.1), 0.8, rtol=1e-6)


@each(lambda case: not case.of_margin and case.loss not in (losses.aot, losses.aot_unpaired))
def test_a_loss_of_each_side_needs_a_reference(case):
    without = side(CHOSEN)._replace(ref_logp=None)
    for pair in ((without, side(REJECTED)), (side(REJECTED), without)):
        with pytest.raises(ValueError, match=r"ref_logp is None; expected the reference's log-probabilities"):
            case.loss(*pair)


def test_robust_dpo_of_flipped_labels_is_dpo_on_average():
    eps = 0.3
    straight, flipped = (np.asarray(losses.robust_dpo(*pair, label_smoothing=eps)) for pair in both_orders())
    np.testing.assert_allclose((1 - eps) * straight + eps * flipped, losses.dpo(side(CHOSEN), side(REJECTED)), 1e-5)
    far = losses.robust_dpo(side([1000.0]), side([0.0]), label_smoothing=eps)
    assert far < 0  # no bug: an unbiased estimate has no lower bound


def both_orders():
    return (side(CHOSEN), side(REJECTED)), (side(REJECTED), side(CHOSEN))


def test_exo_rests_where_the_policy_has_the_labels_odds():
    eps = 0.1
    best = math.log((1 - eps) / eps) / 0.1
    loss = functools.partial(losses.exo_pair, label_smoothing=eps)

    @jax.jit
    def run(logp, beside):
        resting = jax.value_and_grad(lambda x: loss(side([0.0])._replace(logp=x), side([0.0]))[0])(logp)
        return resting, loss(beside, side([0.0, 0.0]))

    (value, gradient), higher = run(np.full((1, 1), best, np.float32), side([best - 1, best + 1]))
    np.testing.assert_allclose([value, float(gradient[0, 0])], 0.0, atol=1e-7)
    assert np.all(np.asarray(higher) > 0)


def test_official_exo_is_exo_less_a_constant():
    eps = math.exp(-4)
    official = losses.exo_official(side(CHOSEN), side(REJECTED), log_epsilon=-4.0)
    normalised = losses.exo_pair(side(CHOSEN), side(REJECTED), label_smoothing=eps / (1 + eps))
    np.testing.assert_allclose(official, normalised - math.log1p(eps), rtol=1e-5)


def test_discopop_has_a_basin_at_a_small_negative_margin():
    grid = np.linspace(-8, 2, 101)
    loss = jax.jit(losses.discopop)(side(grid), side(np.zeros(101)))
    falls = np.diff(loss) < 0
    assert falls[0] and falls[-1] and not falls.all()
    assert -4 < grid[np.argmin(falls)] < 0  # where it turns up


def test_discopop_of_tau_1():
    """m e^-z is then 1 - m: (1 - m) (1 + log(1 + e^-z)), also where e^-z is far beyond float32."""
    z = np.array([-1000.0, -100.0, -2.0, 0.0, 3.0, 30.0])
    loss = jax.jit(functools.partial(losses.discopop, beta=1.0, tau=1.0))(side(z), side(np.zeros(6)))
    np.testing.assert_allclose(loss, (1 + np.logaddexp(0, -z)) * np.exp(-np.logaddexp(0, z)), rtol=1e-5)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "dpo": Row(losses.dpo, pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.5}),
        "cdpo": Row(losses.dpo, pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.2, "label_smoothing": 0.3}),
        "robust_dpo": Row(
            losses.robust_dpo,
            pairwise(losses.robust_dpo),
            references.robust_dpo,
            PAIR,
            {"beta": 0.3, "label_smoothing": 0.2},
        ),
        "hinge": Row(losses.hinge, pairwise(losses.hinge), references.hinge, PAIR, {"beta": 0.2}),
        "ipo": Row(losses.ipo, pairwise(losses.ipo), references.ipo, PAIR, {"beta": 0.3}),
        "ipo_average": Row(
            losses.ipo_average, pairwise(losses.ipo_average), references.ipo_average, PAIR, {"beta": 0.3}
        ),
        "exo_pair": Row(
            losses.exo_pair, pairwise(losses.exo_pair), references.exo_pair, PAIR, {"beta": 0.3, "label_smoothing": 0.1}
        ),
        "exo_official": Row(
            losses.exo_official,
            pairwise(losses.exo_official),
            references.exo_official,
            PAIR,
            {"beta": 0.3, "log_epsilon": -4.0},
        ),
        "discopop": Row(
            losses.discopop, pairwise(losses.discopop), references.discopop, PAIR, {"beta": 0.2, "tau": 0.3}
        ),
    }
