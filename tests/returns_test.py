import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import advantages, returns


def random_rows(seed=0, rows=5, length=9):
    """Rewards, values, log-ratios, masks with holes (the second one empty), bootstraps."""
    rng = np.random.default_rng(seed)
    rewards, values, ratios = rng.normal(size=(3, rows, length)).astype(np.float32)
    mask, bootstrap = rng.random((rows, length)) < 0.6, rng.normal(size=rows).astype(np.float32)
    mask[1] = False
    return rewards, values, ratios, mask, bootstrap


def dirty(mask, *arrays):
    """The arrays with NaN where nothing may look, and the mask."""
    return [jnp.where(mask, x, jnp.nan) for x in arrays] + [jnp.asarray(mask)]


def by_row(mask, of_row, *arrays):
    """A loop over rows from which the masked-out tokens are deleted."""
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        chosen = np.flatnonzero(mask[b])
        out[b, chosen] = of_row(b, *(x[b, chosen].astype(np.float64) for x in arrays))
    return out


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_returns(gamma):
    rewards, _, _, mask, _ = random_rows()

    def definition(b, r):
        return [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]

    close(returns.discounted_returns(*dirty(mask, rewards), gamma=gamma), by_row(mask, definition, rewards))


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_lambda_returns_are_values_and_generalised_advantages(lambda_):
    rewards, values, _, mask, bootstrap = random_rows()

    def recursion(b, r, v):
        after = [*v[1:], bootstrap[b]]
        out = [bootstrap[b]]
        for t in reversed(range(len(r))):
            out.append(r[t] + 0.9 * ((1 - lambda_) * after[t] + lambda_ * out[-1]))
        return out[:0:-1]

    expected = by_row(mask, recursion, rewards, values)
    keywords = {"gamma": 0.9, "lambda_": lambda_, "bootstrap": jnp.asarray(bootstrap)}
    rows = dirty(mask, rewards, values)
    close(returns.lambda_returns(*rows, **keywords), expected)
    close(advantages.gae(*rows, **keywords)[0], np.where(mask, expected - values, 0))


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_n_step_returns(n):
    rewards, values, _, mask, bootstrap = random_rows()

    def definition(b, r, v):
        v, out = [*v, bootstrap[b]], []
        for t in range(len(r)):
            end = min(t + n, len(r))
            out.append(sum(0.9 ** (k - t) * r[k] for k in range(t, end)) + 0.9 ** (end - t) * v[end])
        return out

    expected = by_row(mask, definition, rewards, values)
    rows, keywords = dirty(mask, rewards, values), {"gamma": 0.9, "bootstrap": jnp.asarray(bootstrap)}
    close(jax.jit(returns.n_step_returns)(*rows, n=n, **keywords), expected)
    if n == 1:
        close(returns.td_targets(*rows, **keywords), expected)


@pytest.mark.parametrize("lambda_", [1.0, 0.8])
def test_vtrace(lambda_):
    """From the definition: a sum over the errors ahead, each weighed by the product of the clipped ratios between."""
    rewards, values, ratios, mask, bootstrap = random_rows()
    clips = {"clip_rho": 0.9, "clip_c": 0.7, "clip_advantage": 1.2}

    def targets(b, r, v, ratio):
        v, rho, total = np.append(v, bootstrap[b]), np.exp(ratio), len(r)
        error = np.minimum(rho, 0.9) * (r + 0.95 * v[1:] - v[:-1])
        trace = 0.95 * lambda_ * np.minimum(rho, 0.7)
        return [v[s] + sum(np.prod(trace[s:t]) * error[t] for t in range(s, total)) for s in range(total)]

    def weighted_advantages(b, r, v, ratio):
        ahead = np.append(targets(b, r, v, ratio)[1:], bootstrap[b])[: len(r)]
        after = np.append(v, bootstrap[b])[1:]
        return np.minimum(np.exp(ratio), 1.2) * (r + 0.95 * (lambda_ * ahead + (1 - lambda_) * after) - v)

    old = np.full(mask.shape, -2.0, np.float32)
    *rows, chosen = dirty(mask, old + ratios, old, rewards, values)
    advantage, target = jax.jit(returns.vtrace)(
        *rows, chosen, gamma=0.95, lambda_=lambda_, bootstrap=jnp.asarray(bootstrap), **clips
    )
    close(target, by_row(mask, targets, rewards, values, ratios))
    close(advantage, by_row(mask, weighted_advantages, rewards, values, ratios))


def test_vtrace_on_policy_is_the_lambda_return():
    rewards, values, ratios, mask, bootstrap = random_rows()
    keywords = {"gamma": 0.9, "lambda_": 0.8, "bootstrap": jnp.asarray(bootstrap)}
    rows = dirty(mask, rewards, values)
    logp = jnp.asarray(ratios)
    close(returns.vtrace(logp, logp, *rows, **keywords)[1], returns.lambda_returns(*rows, **keywords))


def test_vtrace_of_a_token_impossible_under_both_policies():
    x, one = jnp.full((1, 2), -jnp.inf), jnp.ones((1, 2))
    jax.tree.map(np.testing.assert_array_equal, returns.vtrace(x, x, one, one, one), returns.vtrace(*[one] * 5))


def test_no_steps_at_all_are_refused():
    x = jnp.ones((1, 2))
    with pytest.raises(ValueError, match=r"n_step_returns: n=0; expected 1 or more"):
        returns.n_step_returns(x, x, x, n=0)


def test_returns_are_constants_and_bad_shapes_are_refused():
    x = jnp.ones((2, 3))

    def everything(values):
        return [
            returns.lambda_returns(x, values, x),
            returns.n_step_returns(x, values, x, n=2),
            *returns.vtrace(values, x, x, values, x),
        ]

    gradient = jax.jit(jax.grad(lambda values: sum(jnp.sum(part) for part in everything(values))))(x)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    for function in (returns.td_targets, returns.lambda_returns):
        with pytest.raises(Exception, match=r"shape|type"):
            function(x, x, x[:, :2])
        with pytest.raises(Exception, match=r"shape|type"):
            function(x, x, x, bootstrap=jnp.ones(3))
