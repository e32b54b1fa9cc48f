"""Mixture of experts: each token's MLP is a weighted sum of a few experts, chosen by a router. No token is dropped.

The work grows with the experts that a token has, not with all there are: assignments of tokens to experts are sorted by
expert and cut into blocks of one expert each, and a loop over the blocks in use multiplies each with its expert's
kernel. The size of a block follows from the number of tokens, so that the same code serves the few tokens of a decoding
step and the many of an update. `jax.lax.ragged_dot` says the same, but where XLA expands it, as on CPU, it multiplies
every assignment with every expert.

On a mesh call the step within `jax.set_mesh(mesh)`: then every device sorts and multiplies the rows it has, or with an
axis "expert" what all rows along it want of the experts it has. Without, the result is the same, and every device works
on all rows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from alignax.models.config import TransformerConfig
from alignax.models.remat import named
from alignax.sharding import ROW_AXES, divisors
from alignax.types import Array

_LARGEST_BLOCK = 128


class Blocks(NamedTuple):
    """Where the N k assignments of N tokens to k experts each go among n blocks of m slots; a block has one expert."""

    slots: Int[Array, "N k"]  # of each assignment, from 0 to below n m
    tokens: Int[Array, " n*m"]  # of each slot; N for an empty one
    experts: Int[Array, " n"]  # of each block
    used: Int[Array, ""]  # the blocks before this one hold something


class MixtureMLP(nn.Module):
    """sum over the chosen experts e of a token of weight_e down_e(activation(gate_e(x)) * up_e(x)).

    The router's logits are x @ router; the `experts_per_token` largest choose. The weights are a softmax in float32: of
    the chosen logits, or without `normalise_experts` of all, so that those of the chosen ones sum to less than 1.

    See "Mixtral of Experts", Jiang et al. (https://arxiv.org/abs/2401.04088), section 2.1.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """The mixture, and the router's sums over the tokens that are `counted` (None: no sums)."""
        config = self.config
        router = _Kernel(config, (config.hidden_size, config.num_experts), name="router")().astype(config.dtype)
        logits = jnp.matmul(x, router, preferred_element_type=jnp.float32)
        weights, chosen = _choose(config, logits)
        mixed = _Experts(config, name="experts")(x, chosen, weights)
        if counted is None:
            return mixed, {}
        rows = counted.size
        return mixed, router_sums(logits.reshape(rows, -1), chosen.reshape(rows, -1), counted.reshape(rows))


class _Experts(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, chosen: Array, weights: Array) -> Array:
        config, inner, outer = self.config, self.config.intermediate_size, self.config.hidden_size
        shapes = {"gate": (outer, inner), "up": (outer, inner), "down": (inner, outer)}
        kernels = {
            name: _Kernel(config, (config.num_experts, *shape), name=name)().astype(config.dtype)
            for name, shape in shapes.items()
        }

        def mixed(x, chosen, weights, kernels):
            rows, chosen = x.reshape(-1, outer), chosen.reshape(-1, config.experts_per_token)
            blocks = in_blocks(chosen, kernels["up"].shape[0])

            def product(x, name):
                return grouped_matmul(x, kernels[name], blocks.experts, blocks.used)

            rows = rows.at[blocks.tokens].get(mode="fill", fill_value=0)
            rows = rows.reshape(blocks.experts.shape[0], -1, outer)
            inner = config.activation(product(rows, "gate")) * product(rows, "up")
            rows = product(named(inner, "mlp_inner"), "down")
            chosen_rows = rows.reshape(-1, outer)[blocks.slots]
            mixed = jnp.einsum("nkd,nk->nd", chosen_rows, weights.reshape(chosen.shape).astype(config.dtype))
            return mixed.reshape(x.shape)

        return _on_own_rows(mixed, x.shape, config.num_experts)(x, chosen, weights, kernels)


def _on_own_rows(mixed: Callable[..., Array], shape: tuple[int, ...], experts: int) -> Callable[..., Array]:
    """`mixed` of the tokens that a device has; left to itself, XLA would gather all rows before it sorts them.

    Where experts lie over devices, these exchange tokens first: each has the tokens of all of them, adds up what its
    own experts make of them, and gives the others their part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes}
    rows = tuple(name for name in ROW_AXES if name in free)
    parts = math.prod(free[name] for name in rows)
    if parts == 1 or shape[0] % parts or experts % free.get("expert", 1):
        return mixed

    def exchanged(x: Array, chosen: Array, weights: Array, kernels: dict[str, Array]) -> Array:
        x, chosen, weights = (jax.lax.all_gather(part, "expert", tiled=True) for part in (x, chosen, weights))
        chosen -= jax.lax.axis_index("expert") * (experts // free["expert"])
        return jax.lax.psum_scatter(mixed(x, chosen, weights, kernels), "expert", tiled=True)

    own = PartitionSpec(rows, *divisors(free, shape[1], "sequence"))
    spread = "expert" if free.get("expert", 1) > 1 else None
    options = {"mesh": mesh, "axis_names": {*rows, *own[1:]}, "check_vma": False}
    specs = (own, own, own, PartitionSpec(spread))
    return jax.shard_map(exchanged if spread else mixed, in_specs=specs, out_specs=own, **options)


class _Kernel(nn.Module):
    config: TransformerConfig
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        normal = nn.initializers.normal(self.config.initializer_range)
        return self.param("kernel", normal, self.shape, self.config.param_dtype)


def _choose(config: TransformerConfig, logits: Array) -> tuple[Array, Array]:
    top, chosen = jax.lax.top_k(logits, config.experts_per_token)
    if config.normalise_experts:
        return jax.nn.softmax(top, axis=-1), chosen
    return jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


def router_sums(logits: Float[Array, "N E"], chosen: Int[Array, "N k"], counted: Bool[Array, " N"]) -> dict[str, Array]:
    """Sums over the counted tokens, from which `alignax.losses.load_balancing` and `router_z` are made.

    Returns:
      "expert_tokens" [E], how many tokens chose each expert; "expert_probs" [E], the sum of the softmax of the logits;
      "router_z" [], the sum of the squared log-sum-exp of the logits.
    """
    logits = jnp.where(counted[:, None], logits, 0.0)
    tokens = jnp.zeros(logits.shape[1]).at[chosen].add(counted.astype(jnp.float32)[:, None])
    probs = jnp.where(counted[:, None], jax.nn.softmax(logits, axis=-1), 0.0)
    z = jnp.where(counted, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0)
    return {"expert_tokens": tokens, "expert_probs": jnp.sum(probs, axis=0), "router_z": jnp.sum(z)}


def in_blocks(chosen: Int[Array, "N k"], num_experts: int) -> Blocks:
    """Sorts assignments by expert and gives every expert as many whole blocks as it needs.

    Those to experts below 0 or from `num_experts` on, which are elsewhere, come last, in blocks that are not used.
    """
    assignments, per_token = chosen.size, chosen.shape[1]
    chosen = jnp.where((chosen >= 0) & (chosen < num_experts), chosen, num_experts)
    size = _block_size(assignments / num_experts)
    count = assignments // size + min(num_experts + 1, assignments)  # enough, however they fall
    expert = chosen.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    load = jnp.zeros(num_experts + 1, jnp.int32).at[expert].add(1)
    needed = -(-load // size)
    ends = jnp.cumsum(needed)
    rank = jnp.arange(assignments) - (jnp.cumsum(load) - load)[expert[order]]  # among those of the same expert
    slot = (ends - needed)[expert[order]] * size + rank
    slots = jnp.zeros(assignments, jnp.int32).at[order].set(slot)
    tokens = jnp.full(count * size, chosen.shape[0]).at[slot].set(order // per_token)
    experts = jnp.searchsorted(ends, jnp.arange(count), side="right", method="compare_all")
    return Blocks(slots.reshape(chosen.shape), tokens, jnp.minimum(experts, num_experts - 1), ends[-2])


def _block_size(load: float) -> int:
    """Half the mean load of an expert, up to a power of 2: little padding, and not too many steps of the loop."""
    size = 4
    while size < min(load / 2, _LARGEST_BLOCK):
        size *= 2
    return size


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "n m a"], kernels: Float[Array, "E a b"], experts: Int[Array, " n"], used: Int[Array, ""]
) -> Float[Array, "n m b"]:
    """x[i] @ kernels[experts[i]] for every block i < used, and 0 for the others."""

    def step(i, out):
        return out.at[i].set(x[i] @ kernels[experts[i]])

    return jax.lax.fori_loop(0, used, step, jnp.zeros((*x.shape[:2], kernels.shape[2]), x.dtype))


def _forward(x: Array, kernels: Array, experts: Array, used: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(x, kernels, experts, used), (x, kernels, experts, used)


def _backward(saved: tuple[Array, ...], grad: Array) -> tuple[Array | None, ...]:
    # By hand, since the transposed loop that autodiff makes adds a whole array of kernels in every step.
    x, kernels, experts, used = saved

    def step(i, grads):
        expert, back = experts[i], jnp.matmul(grad[i], kernels[experts[i]].T)
        own = jnp.matmul(x[i].T, grad[i], preferred_element_type=jnp.float32)
        return grads[0].at[i].set(back), grads[1].at[expert].add(own)

    grads = jnp.zeros_like(x), jnp.zeros(kernels.shape, jnp.float32)
    x_grad, kernel_grad = jax.lax.fori_loop(0, used, step, grads)
    return x_grad, kernel_grad.astype(kernels.dtype), None, None


grouped_matmul.defvjp(_forward, _backward)
