"""What an update holds on each device, told before anything is compiled: from shapes, shardings and a traced loss.

    found = planning.plan(config, partial(preference.make_loss, loss=losses.dpo), optax.adam(1e-6), batch,
                          mesh=AbstractMesh((8, 4), ("fsdp", "tensor")), reference=True, microbatches=4)
    print(found)
    planning.check_fits(found, 80 * 2**30)

Parameters, optimizer state and the like are exact. Activations are those of one micro-batch on one device, by the
lifetimes in the traced gradient (`liveness`), whose few rules were found by comparing with XLA on a CPU: its figure,
arguments and temporaries together, is met to about 10 % (SFT and DPO, 2 to 8 layers, 16 to 2048 tokens, 1 to 32 rows,
everything, products or nothing kept, in 1 or 4 parts; SFT also on eight simulated devices, over every axis).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from alignax import sharding
from alignax.models.config import TransformerConfig
from alignax.models.heads import with_score
from alignax.models.liveness import peak_bytes
from alignax.models.transformer import RULES, transformer
from alignax.types import LossFn, Model, Params, Scalar

ONE_DEVICE = AbstractMesh((1,), ("data",))


class Plan(NamedTuple):
    """Bytes on each device. The first five stay; of the others the fullest moment counts, see `total`."""

    parameters: int
    optimizer: int  # its state
    reference: int
    critic: int  # its parameters and its optimizer's state
    batch: int
    gradients: int  # accumulated in float32, while the parts run and the optimizer steps
    activations: int  # of one micro-batch, forwards and backwards, with the gradients of that part
    step: int  # what the optimizer makes before the old state may go: updates, and its new state
    cache: int  # of a rollout, when there is neither gradient nor activation

    @property
    def total(self) -> int:
        """At the fullest moment: in the backward pass, in the optimizer's step or in a rollout."""
        moments = self.gradients + self.activations, self.gradients + self.step, self.cache
        return sum(self[:5]) + max(moments)

    @property
    def largest(self) -> str:
        """The name of the largest item."""
        return max(self._fields, key=lambda name: getattr(self, name))

    def __str__(self) -> str:
        """A table, an item a line."""
        lines = [f"{name:<12}{_size(value):>12}" for name, value in self._asdict().items() if value]
        return "\n".join([*lines, f"{'at once':<12}{_size(self.total):>12}", f"the largest: {self.largest}"])


def plan(
    config: TransformerConfig,
    make_loss: Callable[[Model], LossFn],
    optimizer: optax.GradientTransformation,
    batch: Any,
    *,
    build: Callable[[TransformerConfig], Model] = transformer,
    mesh: Mesh | AbstractMesh = ONE_DEVICE,
    rules: sharding.Rules = RULES,
    host: str | None = None,
    microbatches: int = 1,
    reference: bool = False,
    critic: TransformerConfig | None = None,
    cache: tuple[int, int] | None = None,
    hyper: dict[str, Scalar] | None = None,
) -> Plan:
    """The bytes on each device of `train.make_update(make_loss(model), optimizer, microbatches=...)`.

    Args:
      config: of the model; its remat policy and dtypes count.
      make_loss: an algorithm's `make_loss`, with its options.
      optimizer: any optax transformation.
      batch: arrays or shapes, of all devices; its leaves lead with the rows.
      build: makes the model, such as `lambda config: with_score(transformer(config))` for a reward model.
      mesh: of devices or an abstract one. The rows are split over its axes "data", "fsdp" and "expert"; over "tensor"
        heads, MLP and vocabulary, as far as they divide; over "sequence" what is live of a row.
      rules: of the parameters, as for `sharding.shardings`.
      host: a regex of the leaves in the host's memory, as for `sharding.shardings`: "^opt_state/" or "^reference/".
      microbatches: parts of an update.
      reference: whether a frozen copy of the model is there, as `frozen["reference"]`.
      critic: a critic of its own, with a scalar head and this optimizer; it learns before or after the policy.
      cache: rows, of all devices, and slots of a rollout's cache.
      hyper: what the loss needs.

    Raises:
      ValueError: for rows that do not divide into the micro-batches and devices, and what the rules refuse.
    """
    devices = sharding.row_devices(mesh)
    part = _part(batch, microbatches * devices)
    params = _init(build(config))
    local = build(_one_share(config, mesh.shape.get("tensor", 1)))

    def held(name: str, tree: Any) -> int:
        return _held({name: tree}, mesh, rules, host)

    state = held("opt_state", jax.eval_shape(optimizer.init, params))
    gradients = held("params", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params))
    frozen = {"reference": _init(local)} if reference else None
    critics = () if critic is None else _init(with_score(transformer(critic)))
    slots = () if cache is None else jax.eval_shape(lambda: local.init_cache(-(-cache[0] // devices), cache[1]))
    return Plan(
        parameters=held("params", params),
        optimizer=state,
        reference=held("reference", params) if reference else 0,
        critic=held("params", critics) + held("opt_state", jax.eval_shape(optimizer.init, critics)) if critic else 0,
        batch=_bytes(part) * microbatches,
        gradients=gradients,
        activations=_spread(_activations(make_loss(local), _init(local), part, frozen, hyper or {}), local, mesh),
        step=gradients + state,
        cache=_bytes(slots),
    )


def fits(plan: Plan, available: int, *, spare: float = 0.1) -> bool:
    """Whether all of it fits a device of `available` bytes, of which the share `spare` is left to what is not known."""
    return plan.total <= available * (1 - spare)


def check_fits(plan: Plan, available: int, *, spare: float = 0.1) -> None:
    """Refuses what does not fit, as `fits` has it.

    Raises:
      ValueError: with the table, and the largest item.
    """
    if not fits(plan, available, spare=spare):
        raise ValueError(
            f"{_size(plan.total)} at once on each device; expected at most {_size(int(available * (1 - spare)))}, all "
            f"but {spare:.0%} of {_size(available)}; the largest item is {plan.largest}\n{plan}"
        )


def _activations(loss_fn: LossFn, params: Params, part: Any, frozen: Any, hyper: dict[str, Scalar]) -> int:
    def gradient(params, part, frozen, hyper):
        def loss(params):
            terms, metrics = loss_fn(params, part, frozen, hyper)
            return sum(jnp.asarray(term.weight * term.mean.value()) for term in terms.values()), (terms, metrics)

        return jax.grad(loss, has_aux=True)(params)

    return peak_bytes(jax.make_jaxpr(gradient)(params, part, frozen, hyper).jaxpr)


def _spread(live: int, local: Model, mesh: Mesh | AbstractMesh) -> int:
    """What is live with its tokens spread over "sequence", and over "fsdp" the gradients that are part of it."""
    gradients = _bytes(_init(local))
    return (live - gradients) // mesh.shape.get("sequence", 1) + gradients // mesh.shape.get("fsdp", 1)


def _one_share(config: TransformerConfig, parts: int) -> TransformerConfig:
    """The network as one device of a tensor-parallel mesh has it."""
    names = ("num_heads", "num_kv_heads", "intermediate_size", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    shares = {name: size // parts for name, size in sizes.items() if size % parts == 0}
    if "num_kv_heads" not in shares or "num_heads" not in shares:  # then every device has all heads
        shares = {name: size for name, size in shares.items() if not name.endswith("heads")}
    return dataclasses.replace(config, **shares)


def _part(batch: Any, parts: int) -> Any:
    def cut(path, leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"plan: batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which do not divide into {parts} "
                "parts, the micro-batches of all devices that take rows"
            )
        return jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(cut, batch)


def _init(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))


def _held(tree: Any, mesh: Mesh | AbstractMesh, rules: sharding.Rules, host: str | None) -> int:
    """The bytes of a tree's shards on one device, without those that lie in the host's memory."""
    where = jax.tree.leaves(sharding.shardings(tree, mesh, rules, host=host))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), where, strict=True)
        if place.memory_kind != "pinned_host"
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
