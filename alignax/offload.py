"""An optimizer whose state stays in the host's memory and visits the device leaf by leaf.

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), offload.offloaded(optax.adamw(1e-5)))
    create = lambda params: train.TrainState.create(params, optimizer)
    state = sharding.born_sharded(create, mesh, rules, host=r"^opt_state/")(params)
    update = jax.jit(train.make_update(loss_fn, optimizer), donate_argnums=0)

XLA would fetch a whole state at once, and hold the old one beside the new one: more memory than without the host. So
each leaf of the parameters gets a state and an update of its own, and the next one is fetched when one is back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignax import sharding
from alignax.types import Array, Params


class Offloaded(NamedTuple):
    """The optimizer's state of each leaf of the parameters, in their order; paths end in the parameter's path."""

    leaves: tuple[optax.OptState, ...]


def offloaded(optimizer: optax.GradientTransformation, *, ahead: int = 1) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with its state by leaves, so that what lies in the host's memory can be streamed.

    Where the state lies on the device nothing is copied, and the result is the same.

    Args:
      optimizer: one that updates every leaf for itself, as Adam, Lion and SGD do. What reads all gradients together
        (`optax.clip_by_global_norm`) belongs before it in an `optax.chain`.
      ahead: how many leaves are fetched while another is updated. 0 takes the least memory and waits for each.

    Raises:
      ValueError: for `ahead` below 0, and from `init` when the optimizer does not update every leaf for itself.
    """
    if ahead < 0:
        raise ValueError(f"offloaded: ahead={ahead}; expected 0 or more")
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Params) -> Offloaded:
        _check_apart(optimizer, params)
        return Offloaded(tuple(optimizer.init(part) for part in _parts(params)))

    def update(updates: Any, state: Any, params: Params | None = None, *, usable: Any = True, **extra: Any):
        own = [None] * len(state.leaves) if params is None else _parts(params)
        found, done = [], []
        for i, (part, old, leaf) in enumerate(zip(_parts(updates), state.leaves, own, strict=True)):
            after = (usable, done[i - 1 - ahead] if i > ahead else ())
            before = sharding.to_device(old, after)
            change, new = optimizer.update(part, before, leaf, **extra)
            done.append(sharding.back(jax.tree.map(lambda x, y: _chosen(usable, x, y), new, before), old))
            found += jax.tree.leaves(change)
        return jax.tree.structure(updates).unflatten(found), Offloaded(tuple(done))

    return optax.GradientTransformationExtraArgs(init, update)


def _chosen(usable: Any, new: Array, old: Array) -> Array:
    return jnp.where(usable, new.astype(old.dtype), old)


def _parts(tree: Any) -> list[Any]:
    """The tree once for each of its leaves, without the others: masks by path see the same paths."""
    leaves, treedef = jax.tree.flatten(tree)
    return [treedef.unflatten([x if i == k else None for i, x in enumerate(leaves)]) for k in range(len(leaves))]


def _check_apart(optimizer: optax.GradientTransformation, params: Params) -> None:
    """Tries the optimizer on a tree of the same structure, one number to a leaf: together and leaf by leaf."""
    leaves, treedef = jax.tree.flatten(params)
    ones = [np.ones((1,) * x.ndim, x.dtype) for x in leaves]
    small, grads = treedef.unflatten(ones), treedef.unflatten([10 * (i + 1) * x for i, x in enumerate(ones)])

    def named(params: Params, grads: Any) -> dict[str, Any]:
        # The new state too: Adam's first update is the same for clipped gradients.
        both = optimizer.update(grads, optimizer.init(params), params)
        return {sharding.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(both)}

    with jax.ensure_compile_time_eval():
        together = named(small, grads)
        apart = [named(part, grad) for part, grad in zip(_parts(small), _parts(grads), strict=True)]
    for name, x in (item for part in apart for item in part.items()):
        if not np.allclose(np.asarray(x, np.float32), np.asarray(together[name], np.float32), rtol=1e-2):
            raise ValueError(
                f"offloaded: {name!r} of the updates (0) and the state (1) depends on several leaves; expected an "
                "optimizer that updates every leaf for itself, after what reads all (clipping) in an optax.chain"
            )
