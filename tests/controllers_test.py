import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import controllers

LIMITS = {"target": 6.0, "horizon": 100, "count": 50}


@pytest.mark.parametrize(
    "kl, factor",
    [(6.0, 1.0), (6.6, 1.05), (5.4, 0.95), (7.2, 1.1), (60.0, 1.1), (0.0, 0.9), (-3.0, 0.9)],  # 20 % at the most
)
def test_adaptive_kl(kl, factor):
    for rule in (controllers.adaptive_kl, jax.jit(functools.partial(controllers.adaptive_kl, **LIMITS))):
        keywords = LIMITS if rule is controllers.adaptive_kl else {}
        np.testing.assert_allclose(rule(0.2, kl, **keywords), 0.2 * factor, rtol=1e-6)
        np.testing.assert_allclose(rule(jnp.float32(0.2), jnp.float32(kl), **keywords), 0.2 * factor, rtol=1e-6)


def test_adaptive_kl_settles_where_the_kl_is_its_target():
    # a policy whose KL falls as the coefficient rises
    coefficient = 0.001
    for _ in range(300):
        coefficient = controllers.adaptive_kl(coefficient, 1 / coefficient, target=8.0, horizon=100, count=50)
    np.testing.assert_allclose(coefficient, 1 / 8, rtol=1e-3)


@pytest.mark.parametrize("kl, factor", [(0.007, 1.0), (0.0149, 1.0), (0.0151, 2.0), (0.0066, 0.5), (-1.0, 0.5)])
def test_ppo_paper_kl(kl, factor):
    rule = jax.jit(controllers.ppo_paper_kl)
    np.testing.assert_allclose(rule(0.3, kl), 0.3 * factor, rtol=1e-6)
    np.testing.assert_allclose(controllers.ppo_paper_kl(0.3, kl), 0.3 * factor, rtol=1e-6)


@pytest.mark.parametrize("entropy, expected", [(0.1, 0.05), (0.2, 0.05), (0.21, 0.03)])
def test_adaptive_entropy(entropy, expected):
    np.testing.assert_allclose(controllers.adaptive_entropy(0.04, entropy, step=0.01), expected, rtol=1e-6)
    traced = jax.jit(controllers.adaptive_entropy)(0.04, entropy, step=0.01)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "rule, down, up",
    [
        (functools.partial(controllers.adaptive_kl, **LIMITS), 0.0, 60.0),
        (controllers.ppo_paper_kl, 0.0, 1.0),
        (controllers.adaptive_entropy, 5.0, 0.0),
    ],
)
def test_coefficients_stay_between_their_limits(rule, down, up):
    np.testing.assert_allclose(rule(0.5, down, low=0.499, high=0.501), 0.499, rtol=1e-6)
    np.testing.assert_allclose(rule(0.5, up, low=0.499, high=0.501), 0.501, rtol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [functools.partial(controllers.adaptive_kl, **LIMITS), controllers.ppo_paper_kl, controllers.adaptive_entropy],
)
def test_a_measurement_that_is_nan_changes_nothing(rule):
    assert rule(0.25, jnp.nan) == 0.25


@pytest.mark.parametrize("name", ["target", "horizon"])
def test_a_kl_is_held_to_something(name):
    with pytest.raises(ValueError, match=f"adaptive_kl: {name}=0; expected {name} > 0"):
        controllers.adaptive_kl(0.2, 6.0, **LIMITS | {name: 0.0})
