"""One update step for every algorithm: micro-batches, exact accumulation, a guard against non-finite gradients.

A loss function returns named terms, each a weight and a `Mean(total, count)`. The gradient is that of

    sum over terms of  weight * (total over the whole batch) / (count over the whole batch),

whatever the batch was split into. Counts depend on masks alone, so those of several parts are summed first (XLA drops
the forward pass that would come with them); then each part's gradient is already divided rightly, and parts simply add
up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from alignax import leafwise, sharding
from alignax.types import Array, LossFn, Max, Mean, Params, Scalar, Term


class TrainState(NamedTuple):
    """What an update changes: arrays only, so that it can be donated, sharded and checkpointed as it is."""

    step: Array  # int32 [], updates asked for
    skipped: Array  # int32 [], of which left out because the gradient was not finite
    params: Params
    opt_state: optax.OptState
    key: Array  # for the user's loop; an update leaves it alone
    skipped_in_a_row: Array  # int32 [], the last updates, all left out; 0 after one that was not

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation, key: Array | None = None) -> "TrainState":
        """A state at step 0. `params` are used as they are: pass a copy if the state will be donated."""
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # buffers of their own, to be donated
        key = jax.random.key(0) if key is None else key
        return cls(step, skipped, params, optimizer.init(params), key, in_a_row)


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    statistics: Callable[..., dict[str, Mean | Max]] | None = None,
    axis_name: str | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Makes `update(state, batch, frozen=None, hyper=None) -> (state, metrics)`, a pure function that the caller jits.

    Args:
      loss_fn: `(params, batch, frozen, hyper) -> ({name: Term}, {name: Mean or Max})`.
      optimizer: any optax transformation.
      microbatches: into how many parts the batch is split to save memory. The result is the same for any number.
      statistics: `(params, batch, frozen, hyper) -> {name: Mean or Max}`, batch-coupled numbers that the loss needs as
        constants. They are taken over the whole batch first and reach `loss_fn` as entries of `hyper`.
      axis_name: the axis of `jax.pmap` to sum over; None under `jax.jit`, where a sharded batch needs nothing.

    Returns:
      The update. Its `batch` is a pytree whose leaves lead with B; `frozen` holds weights that are not trained (which
      may lie in the host's memory, see `alignax.sharding`); `hyper` is a dict of numbers, traced, so that changing one
      recompiles nothing. Its metrics are scalars: those of the loss function, `loss`, `loss/NAME` of each term,
      `grad_norm`, `skipped` (1 for a step left out) and `skipped/in_a_row` (the last steps, all left out: see
      `stop_after_skips`).

    Raises:
      ValueError: when a batch does not divide into the micro-batches, or must not be divided (`losses.aot`).
    """
    if microbatches < 1:
        raise ValueError(f"make_update: microbatches={microbatches}; expected at least 1")
    if getattr(loss_fn, "whole_batch", False) and (microbatches > 1 or axis_name is not None):
        raise ValueError(
            f"make_update: microbatches={microbatches}, axis_name={axis_name!r}; the loss compares the rows of a batch "
            "with each other and cannot be split: expected 1 and None"
        )
    loss_fn, statistics = _fetching(loss_fn), None if statistics is None else _fetching(statistics)

    def update(state: TrainState, batch: Any, frozen: Any = None, hyper: dict[str, Scalar] | None = None):
        parts = _split(batch, microbatches)
        hyper = dict(hyper or {})
        if statistics is not None:
            measure = statistics
            found = _over_parts(lambda part: measure(state.params, part, frozen, hyper), parts, axis_name)
            hyper |= {name: jax.lax.stop_gradient(value.value()) for name, value in found.items()}

        def count(part):
            terms, _ = loss_fn(state.params, part, frozen, hyper)
            return {name: Mean(jnp.zeros(()), term.mean.count) for name, term in terms.items()}

        one = microbatches == 1 and axis_name is None  # which knows the counts itself: the loss is traced once
        counts = {} if one else {name: mean.count for name, mean in _over_parts(count, parts, axis_name).items()}

        def part_loss(params, part):
            terms, metrics = loss_fn(params, part, frozen, hyper)
            known = {name: jax.lax.stop_gradient(term.mean.count) for name, term in terms.items()} if one else counts
            means = {name: Mean(term.mean.total, known[name]) for name, term in terms.items()}
            loss = sum(term.weight * means[name].value() for name, term in terms.items())
            return loss, (terms, metrics)

        grads, terms, metrics = _accumulate(part_loss, state.params, parts, axis_name)
        losses = {name: term.mean.value() for name, term in terms.items()}
        report = {name: value.value() for name, value in metrics.items()}
        report |= {f"loss/{name}": value for name, value in losses.items()}
        report["loss"] = jnp.asarray(sum(terms[name].weight * value for name, value in losses.items()))
        return _apply(state, grads, optimizer, report)

    return update


def stop_after_skips(step: int, metrics: Mapping[str, Any], *, limit: int = 10) -> None:
    """Ends a run whose updates are no longer finite; call it where metrics are read anyway, since it waits for them.

    A single step left out does no harm: a rare batch overflows. Where every step is, nothing is learned any more.

    Args:
      step: of the loop, for the message.
      metrics: of an update, or of several whose names have prefixes of their own; those of `skipped/in_a_row` count.
      limit: how many steps in a row are too many.

    Raises:
      FloatingPointError: when that many were left out, with the step, their number, the last loss and gradient norm.
      ValueError: for a limit below 1.
    """
    if limit < 1:
        raise ValueError(f"stop_after_skips: limit={limit}; expected at least 1")
    for name in metrics:
        prefix = name.removesuffix("skipped/in_a_row")
        if prefix == name or float(metrics[name]) < limit:
            continue
        last = (f"{prefix}{part}" for part in ("loss", "grad_norm"))
        said = ", ".join(f"{part} {float(metrics[part]):.4g}" for part in last if part in metrics)
        raise FloatingPointError(
            f"step {step}: {name} is {float(metrics[name]):.0f}, the limit is {limit}: so many updates running were "
            f"left out, because a loss, a gradient or an update was not finite. The last: {said}. A loss that is not "
            "finite points at the batch (rewards, weights, log-probabilities) or at parameters that were not when the "
            "run began; a finite loss with a gradient norm that is not, at the learning rate or a missing clip"
        )


def make_measure(
    loss_fn: LossFn, *, statistics: Callable[..., dict[str, Mean | Max]] | None = None
) -> Callable[..., dict[str, Mean | Max]]:
    """Makes `measure(params, batch, frozen=None, hyper=None) -> {name: Mean or Max}`, for held-out rows; jit it.

    It gives the loss function's metrics and its terms as `loss/NAME`, not yet divided: see `merge`. `statistics` as in
    `make_update`, here of the rows of one batch.
    """

    loss_fn, statistics = _fetching(loss_fn), None if statistics is None else _fetching(statistics)

    def measure(params: Params, batch: Any, frozen: Any = None, hyper: dict[str, Scalar] | None = None):
        hyper = dict(hyper or {})
        if statistics is not None:
            found = statistics(params, batch, frozen, hyper)
            hyper |= {name: value.value() for name, value in found.items()}
        terms, metrics = loss_fn(params, batch, frozen, hyper)
        return dict(metrics) | {f"loss/{name}": term.mean for name, term in terms.items()}

    return measure


def merge(parts: Iterable[dict[str, Mean | Max]]) -> dict[str, Array]:
    """The values over several batches of what `make_measure` gave for each: means of all rows, not means of means.

    Raises:
      ValueError: when there is no part.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge: there is nothing to merge; expected the measures of at least one batch")
    return {
        name: value.value() for name, value in _combine(jax.tree.map(lambda *x: jnp.stack(x), *parts), None).items()
    }


def minibatches(key: Array, batch: Any, count: int) -> Iterator[Any]:
    """`count` minibatches of one fresh permutation of the batch's rows: one epoch over a rollout.

    Raises:
      ValueError: when leaves differ in their number of rows, or these do not divide evenly.
    """
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(f"minibatches: the batch's leaves have {sorted(sizes)} rows; expected one number")
    (rows,) = sizes
    if count < 1 or rows % count:
        raise ValueError(f"minibatches: {rows} rows do not divide into {count} minibatches of one size")
    order = jax.random.permutation(key, rows).reshape(count, -1)
    return (jax.tree.map(lambda x, chosen=chosen: x[chosen], batch) for chosen in order)


def ema(average: Params, params: Params, *, rate: Scalar) -> Params:
    """(1 - rate) * average + rate * params, leaf by leaf: a reference that follows the policy.

    rate 1 copies, 0 keeps. Averages with a rate below 1e-3 need float32 (bfloat16 rounds such steps away). An average
    that is not sharded as the parameters are stays where it is only with `jax.jit(ema, out_shardings=...)`.
    """

    def mix(old: Array, new: Array) -> Array:
        return ((1 - rate) * old.astype(jnp.float32) + rate * new.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, average, params)


def ema_every(reference: Params, params: Params, step: Scalar, *, every: Scalar, rate: Scalar = 1.0) -> Params:
    """Reference after update `step`: `ema(reference, params, rate)` at every `every`-th update, else as it was.

    TR-DPO: rate 0.6 is its soft update, rate 1 its hard one, each every 512 updates. See "Learn Your Reference Model
    for Real Good Alignment", Gorbatovski et al. (https://arxiv.org/abs/2404.09656), section 3. Every update with a low
    rate is `ema`. sDPO is the hard update where a stage of the data ends, with a new optimizer state: "sDPO: Don't Use
    Your Data All at Once", Kim et al. (https://arxiv.org/abs/2403.19270). Reference log-probabilities that were taken
    ahead no longer hold afterwards.

    Raises:
      ValueError: for an `every` that is known to be below 1.
    """
    if not isinstance(every, Tracer) and every < 1:
        raise ValueError(f"ema_every: every={every}; expected at least 1")
    rate = jnp.where(jnp.asarray(step) % every == 0, rate, 0.0)
    return ema(reference, params, rate=rate)


def in_parts(fn: Callable[..., Any], size: int) -> Callable[..., Any]:
    """Makes `(params, rows) -> fn(params, rows)`, run on at most `size` rows at a time to save memory; jit it.

    `fn` treats rows independently, rows of zeros included, and gives arrays that lead with B, as log-probabilities and
    scores do.
    """
    if size < 1:
        raise ValueError(f"in_parts: size={size}; expected at least 1")

    def mapped(params: Params, rows: Any) -> Any:
        count = jax.tree.leaves(rows)[0].shape[0]
        parts = -(-count // size)
        missing = -count % parts
        if missing:
            rows = jax.tree.map(lambda x: jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)), rows)
        found = jax.lax.map(lambda part: fn(params, part), _split(rows, parts))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:count], found)

    return mapped


def _fetching(fn: Callable) -> Callable:
    # The copy is made for each part of a batch, so that the device holds frozen weights only while it reads them.
    return lambda params, part, frozen, hyper: fn(params, part, sharding.to_device(frozen, after=part), hyper)


def _split(batch: Any, parts: int) -> Any:
    """Leaves [B, ...] as [parts, B / parts, ...]; strided, since a contiguous split of a sharded batch gathers it."""

    def split(path, leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"update: batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which do not divide into "
                f"microbatches={parts}"
            )
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    return jax.tree_util.tree_map_with_path(split, batch)


def _over_parts(fn: Callable, parts: Any, axis_name: str | None) -> dict[str, Any]:
    """A dict of Mean, Max or Term from each part, combined over all parts and devices."""
    return _combine(jax.lax.map(fn, parts), axis_name)


def _combine(stacked: dict[str, Any], axis_name: str | None) -> dict[str, Any]:
    def combine(value):
        if isinstance(value, Term):
            return Term(jnp.asarray(value.weight)[0], combine(value.mean))
        if isinstance(value, Max):
            return Max(_pmax(jnp.max(value.largest), axis_name))
        return Mean(*(_psum(jnp.sum(x, axis=0), axis_name) for x in value))

    return {name: combine(value) for name, value in stacked.items()}


def _accumulate(part_loss: Callable, params: Params, parts: Any, axis_name: str | None):
    """Gradients (float32) summed over parts and devices, with the terms and metrics of all of them."""
    grad = jax.grad(part_loss, has_aux=True)

    def add(total, part):
        grads, aux = grad(params, part)
        terms, metrics = aux
        terms = {name: Term(jnp.asarray(term.weight, jnp.float32), term.mean) for name, term in terms.items()}
        return jax.tree.map(lambda a, g: a + g.astype(jnp.float32), total, grads), (terms, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, (terms, metrics) = jax.lax.scan(add, zeros, parts)
    grads = jax.tree.map(lambda g: _psum(g, axis_name), grads)
    return grads, _combine(terms, axis_name), _combine(metrics, axis_name)


def _apply(state: TrainState, grads: Any, optimizer: optax.GradientTransformation, report: dict[str, Array]):
    norm = optax.tree.norm(grads)
    usable = jnp.isfinite(norm) & jnp.isfinite(report["loss"])
    apart = any(map(_is_leafwise, jax.tree.leaves(state.opt_state, is_leaf=_is_leafwise)))
    extra = {"usable": usable} if apart else {}
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
    params = optax.apply_updates(state.params, updates)
    finite = usable & jnp.isfinite(optax.tree.norm(updates))

    # Float32 gradients would turn the moments of bfloat16 parameters into float32: the state keeps the dtypes it has.
    def choose(new, old):
        # A state that is updated leaf by leaf has chosen: waiting for the last leaf it would have to be there twice.
        return new if _is_leafwise(old) else jnp.where(finite, new.astype(old.dtype), old)

    before = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(choose, (params, opt_state), before, is_leaf=_is_leafwise)
    skipped = 1 - finite.astype(jnp.int32)
    in_a_row = (state.skipped_in_a_row + 1) * skipped
    report |= {"grad_norm": norm, "skipped": skipped.astype(jnp.float32)}
    report["skipped/in_a_row"] = in_a_row.astype(jnp.float32)
    return TrainState(state.step + 1, state.skipped + skipped, params, opt_state, state.key, in_a_row), report


def _is_leafwise(x: Any) -> bool:
    return isinstance(x, leafwise.Leafwise)


def _psum(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _pmax(x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else jax.lax.pmax(x, axis_name)
