"""TRPO: steps along the natural gradient, as long as a bound on the KL divergence allows.

A policy here is `logits_fn(params) -> [B, T, V]`, the logits of the tokens that were sampled from it; `params` any
pytree of floating-point arrays. The Fisher matrix is never built: its product with a vector is one derivative forward
and one backward. See "Trust Region Policy Optimization", Schulman et al. (https://arxiv.org/abs/1502.05477), appendix
C; `make_trpo` is the step of a language model. It holds `[B, T, V]`, and is meant for small ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax import reduce
from alignax.losses._ratios import exp
from alignax.losses.divergence import full_kl
from alignax.types import Array, Model, Params, Scalar

Logits = Callable[[Params], Array]  # params -> [B, T, V]
Accept = Callable[..., Array]  # (kl, improvement, improvement expected, max_kl) -> whether a step is taken


def fisher_vector_product(
    logits_fn: Logits, params: Params, mask: Array, vector: Params, *, damping: Scalar = 0.1
) -> Params:
    """Fisher-vector product: (F + damping) v, F = mean over tokens of J' (diag p - p p') J, J = d logits / d params.

    The Gauss-Newton form, which is the Hessian of KL(old || new) at old = new exactly. See "Trust Region Policy
    Optimization", Schulman et al. (https://arxiv.org/abs/1502.05477), appendix C.1.

    Args:
      logits_fn: params -> `[B, T, V]`.
      params: where F is taken (paper: theta_old).
      mask: `[B, T]`, the tokens that count.
      vector: a pytree like params (paper: y).
      damping: added to the diagonal, so that directions the policy does not depend on stay finite.
    """
    return _curvature(_linearised(logits_fn, params), mask, damping)(vector)


def conjugate_gradient(
    product: Callable[[Params], Params], b: Params, *, iterations: Scalar = 10, tolerance: Scalar = 1e-10
) -> Params:
    """Conjugate gradient: x with A x = b, after some iterations from 0, for a positive definite A given as v -> A v.

    See "Trust Region Policy Optimization", Schulman et al. (https://arxiv.org/abs/1502.05477), appendix C.

    Args:
      product: v -> A v.
      b: a pytree of arrays.
      iterations: at most so many.
      tolerance: stops once the squared norm of b - A x is smaller.
    """
    return _solve(product, b, iterations, tolerance)[0]


def accept_improvement(
    kl: Array, improvement: Array, expected: Array, max_kl: Scalar, *, kl_slack: Scalar = 1.5
) -> Array:
    """TRPO, OpenAI baselines' acceptance: KL <= kl_slack * max_kl and improvement >= 0."""
    del expected
    return (kl <= kl_slack * max_kl) & (improvement >= 0)


def accept_expected(kl: Array, improvement: Array, expected: Array, max_kl: Scalar, *, least: Scalar = 0.1) -> Array:
    """TRPO, textbook acceptance: KL <= max_kl and improvement >= least * what the gradient promises for this step."""
    return (kl <= max_kl) & (improvement >= least * expected)


def surrogate(
    logits: Float[Array, "B T V"],
    actions: Int[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    old_logits: Float[Array, "B T V"] | None = None,
) -> Float[Array, ""]:
    """TRPO's surrogate: mean over tokens of r A, r = exp(logp - old_logp), to be maximised.

    See "Trust Region Policy Optimization", Schulman et al. (https://arxiv.org/abs/1502.05477), eq. 14.

    Args:
      logits: `[B, T, V]`.
      actions: `[B, T]`, the sampled tokens.
      advantages: `[B, T]`, constants.
      mask: `[B, T]`, the tokens the policy chose.
      old_logits: `[B, T, V]` of the policy that sampled, a constant; None: `logits` as they are.
    """
    chex.assert_rank([logits, actions, advantages, mask], [3, 2, 2, 2])
    chex.assert_equal_shape([actions, advantages, mask])
    chex.assert_equal_shape_prefix([logits, actions], 2)
    logits, old_logits = (_of_tokens(x, mask) for x in (logits, logits if old_logits is None else old_logits))
    logp, old_logp = (
        jnp.take_along_axis(jax.nn.log_softmax(x), actions[..., None], axis=2)[..., 0] for x in (logits, old_logits)
    )
    ratio = exp(logp - jax.lax.stop_gradient(old_logp))
    advantages = jax.lax.stop_gradient(jnp.where(mask != 0, advantages.astype(jnp.float32), 0.0))
    return reduce.token_mean(ratio * advantages, mask).value()


class Direction(NamedTuple):
    """The step of full length. gradient: of the surrogate; natural: x with (F + damping) x = gradient; scale: of it."""

    gradient: Params
    natural: Params
    scale: Array
    residual: Array  # norm of gradient - (F + damping) natural
    logits: Array  # before the step


def natural_direction(
    logits_fn: Logits,
    params: Params,
    actions: Int[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    max_kl: Scalar = 0.01,
    damping: Scalar = 0.1,
    iterations: Scalar = 10,
    tolerance: Scalar = 1e-10,
) -> Direction:
    """Natural gradient: x = (F + damping)^-1 g, scaled by sqrt(2 max_kl / x' (F + damping) x).

    To second order the scaled step spends max_kl. See "Trust Region Policy Optimization", Schulman et al.
    (https://arxiv.org/abs/1502.05477), appendix C. Arguments as for `trpo_step`.
    """
    policy = _linearised(logits_fn, params)
    pulled = jax.grad(lambda logits: surrogate(logits, actions, advantages, mask))(policy.logits)
    gradient = policy.backward(pulled)
    natural, left = _solve(_curvature(policy, mask, damping), gradient, iterations, tolerance)
    square = _dot(natural, _add(gradient, left, -1.0))  # x' (F + damping) x: what is left says how far it is from g
    # no gradient, no step: a quotient of 0 by 0 would be NaN
    scale = jnp.where(square == 0, 0.0, jnp.sqrt(2 * max_kl / jnp.where(square == 0, 1.0, square)))
    return Direction(gradient, natural, scale, jnp.sqrt(_dot(left, left)), policy.logits)


def trpo_step(
    logits_fn: Logits,
    params: Params,
    actions: Int[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    max_kl: Scalar = 0.01,
    damping: Scalar = 0.1,
    iterations: Scalar = 10,
    tolerance: Scalar = 1e-10,
    backtracks: Scalar = 10,
    shrink: Scalar = 0.5,
    accept: Accept = accept_improvement,
) -> tuple[Params, dict[str, Array]]:
    """TRPO: maximise mean r A subject to mean KL(old || new) <= max_kl, by a natural gradient step and a line search.

    The first of the steps shrink^k, k < backtracks, that is accepted is taken; where none is, or all is NaN, the
    parameters stay as they are. By default a step may spend 1.5 max_kl, as in OpenAI baselines; `accept_expected` holds
    it to max_kl. See "Trust Region Policy Optimization", Schulman et al.
    (https://arxiv.org/abs/1502.05477), section 6 and appendix C.

    Args:
      logits_fn: params -> `[B, T, V]`, the logits of the tokens in `actions`.
      params: of the policy that sampled, any pytree.
      actions: `[B, T]`, the sampled tokens.
      advantages: `[B, T]`.
      mask: `[B, T]`, the tokens the policy chose.
      max_kl: nats per token (paper: delta).
      damping: of the Fisher matrix.
      iterations, tolerance: of the conjugate gradient.
      backtracks: the most steps that are tried.
      shrink: each as a fraction of the one before.
      accept: `accept_improvement`, `accept_expected` or your own.

    Returns:
      new parameters, and `kl`, `improvement` and `expected_improvement` of the surrogate, `accepted`, `backtracks`,
      `step_scale`, `grad_norm` and `cg_residual`.
    """
    rows = (actions, advantages, mask)
    found = natural_direction(
        logits_fn, params, *rows, max_kl=max_kl, damping=damping, iterations=iterations, tolerance=tolerance
    )
    expected = found.scale * _dot(found.gradient, found.natural)
    before = surrogate(found.logits, *rows)

    def attempt(size: Array) -> tuple[Params, Array, Array]:
        moved = jax.tree.map(lambda p, x: (p + size * found.scale * x).astype(p.dtype), params, found.natural)
        logits = logits_fn(moved)
        kl = reduce.token_mean(full_kl(found.logits, logits, mask), mask).value()
        return moved, kl, surrogate(logits, *rows, old_logits=found.logits) - before

    def searching(state: tuple) -> Array:
        return (state[0] < backtracks) & ~state[1]

    def search(state: tuple) -> tuple:
        tried, _, _, _, _ = state
        size = jnp.asarray(shrink, jnp.float32) ** tried
        moved, kl, improvement = attempt(size)
        accepted = accept(kl, improvement, size * expected, max_kl)
        # all that is kept of a step that was not taken is that it was tried
        moved = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, params)
        return tried + 1, accepted, moved, jnp.where(accepted, kl, 0.0), jnp.where(accepted, improvement, 0.0)

    start = (jnp.zeros((), jnp.int32), jnp.zeros((), bool), params, jnp.zeros(()), jnp.zeros(()))
    tried, accepted, params, kl, improvement = jax.lax.while_loop(searching, search, start)
    info = {"kl": kl, "improvement": improvement, "expected_improvement": expected, "step_scale": found.scale}
    info |= {"accepted": accepted, "backtracks": tried - accepted, "cg_residual": found.residual}
    return params, info | {"grad_norm": jnp.sqrt(_dot(found.gradient, found.gradient))}


def make_trpo(
    model: Model, *, temperature: Scalar = 1.0, accept: Accept = accept_improvement
) -> Callable[..., tuple[Params, dict[str, Array]]]:
    """TRPO, a language model's step: makes `step(params, batch, hyper=None) -> params, info`, pure; jit it.

    The batch has tokens, segments, mask, advantages `[B]` or `[B, T]` and weights (a row of weight 0 is left out, any
    other counts once; None: all count), as `alignax.algorithms.grpo.Batch` has, and was sampled from these very
    parameters. `hyper` holds numbers of `trpo_step`. The model must have a derivative forward: mixtures of experts with
    a kernel of their own have none, nor have the attention kernels of `alignax.models.flash`, which long rows get on
    GPUs and TPUs unless the configuration says `attention=flash.plain()`.
    """

    def step(params: Params, batch: Any, hyper: dict[str, Scalar] | None = None):
        def logits_fn(params: Params) -> Array:
            states = model.hidden(params, batch.tokens, batch.segments).states
            # aligned with the tokens: each was drawn from the state before it
            return model.logits(params, jnp.roll(states, 1, axis=1)) / temperature

        advantages = batch.advantages
        if advantages.ndim == 1:
            advantages = jnp.broadcast_to(advantages[:, None], batch.mask.shape)
        mask = batch.mask != 0
        if batch.weights is not None:
            mask &= (batch.weights != 0)[:, None]
        return trpo_step(logits_fn, params, batch.tokens, advantages, mask, accept=accept, **(hyper or {}))

    return step


class _Policy(NamedTuple):
    """A policy around its parameters; the forward pass runs once, whatever the number of derivatives."""

    logits: Array
    forward: Callable[[Params], Array]  # a change of the parameters -> of the logits
    backward: Callable[[Array], Params]  # a gradient by the logits -> by the parameters


def _linearised(logits_fn: Logits, params: Params) -> _Policy:
    logits, tangent = jax.linearize(logits_fn, params)
    chex.assert_rank(logits, 3)
    transpose = jax.linear_transpose(tangent, params)

    def forward(vector: Params) -> Array:
        return tangent(jax.tree.map(lambda p, v: v.astype(p.dtype), params, vector))

    def backward(pulled: Array) -> Params:
        return jax.tree.map(lambda x: x.astype(jnp.float32), transpose(pulled.astype(logits.dtype))[0])

    return _Policy(logits, forward, backward)


def _curvature(policy: _Policy, mask: Array, damping: Scalar) -> Callable[[Params], Params]:
    """v -> (F + damping) v."""
    chex.assert_shape(mask, policy.logits.shape[:2])
    p = jax.nn.softmax(_of_tokens(policy.logits, mask))
    count = jnp.sum((mask != 0).astype(jnp.float32))
    weight = jnp.where(mask != 0, 1 / jnp.maximum(count, 1.0), 0.0)[..., None]

    def product(vector: Params) -> Params:
        moved = _of_tokens(policy.forward(vector), mask)
        moved = weight * p * (moved - jnp.sum(p * moved, axis=2, keepdims=True))
        return _add(policy.backward(moved), vector, damping)

    return product


def _of_tokens(x: Array, mask: Array) -> Array:
    """float32, and 0 where masked out, whatever stood there."""
    return jnp.where((mask != 0)[..., None], x.astype(jnp.float32), 0.0)


def _dot(x: Params, y: Params) -> Array:
    return sum((jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y))), jnp.zeros(()))


def _add(x: Params, y: Params, factor: Scalar) -> Params:
    """x + factor y, float32."""
    return jax.tree.map(lambda a, b: a.astype(jnp.float32) + factor * b.astype(jnp.float32), x, y)


def _solve(product: Callable, b: Params, iterations: Scalar, tolerance: Scalar) -> tuple[Params, Params]:
    """x and b - A x."""
    b = jax.tree.map(lambda x: x.astype(jnp.float32), b)

    def unfinished(state: tuple) -> Array:
        done, _, _, _, square = state
        return (done < iterations) & (square >= tolerance) & (square > 0)

    def step(state: tuple) -> tuple:
        done, x, residual, direction, square = state
        image = product(direction)
        size = square / _dot(direction, image)
        residual = _add(residual, image, -size)
        following = _dot(residual, residual)
        return done + 1, _add(x, direction, size), residual, _add(residual, direction, following / square), following

    start = (jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, b), b, b, _dot(b, b))
    _, x, residual, _, _ = jax.lax.while_loop(unfinished, step, start)
    return x, residual
