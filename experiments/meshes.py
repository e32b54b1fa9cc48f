"""Every algorithm on every mesh: the same losses, arrays where the rules put them, bytes that fall with the devices.

A process of this module sees eight simulated devices; endurance.py starts it. Each algorithm of tests/problems.py, and
a mixture of experts beside them, makes three AdamW updates on one device and on every mesh.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import problems as tiny  # pyright: ignore[reportMissingImports]

from alignax import models, sharding, train
from alignax.algorithms import sft

DENSE, MIXED = ("data", "fsdp", "sequence", "tensor"), ("data", "fsdp", "expert", "sequence", "tensor")
DEVICES = 8
SPLIT = ("fsdp", "expert", "tensor")  # over which parameters are split


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried."""

    output: pathlib.Path
    """JSON: one line for each algorithm."""
    algorithms: tuple[str, ...] = ()
    """Of tests/problems.py, and "mixture"; empty for all."""
    sizes: tuple[int, ...] = (2, 4, 8)
    """Numbers of devices. Of the last every factorisation is a mesh, of the others each axis alone."""
    every: int = 1
    """Only every so many of the meshes, for a cheap look."""


def mixture() -> tiny.Problem:
    """Supervised learning of a mixture of experts, with its balancing loss."""
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_layers": 2, "num_experts": 8}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "initializer_range": 0.2}
    model = models.transformer(models.TransformerConfig(mixture=True, **sizes, **heads))
    params = jax.jit(model.init)(jax.random.key(0))

    def make_loss(model):
        return sft.make_loss(model, aux_weight=0.01)

    batch = sft.Batch(**tiny.rows(tiny.ROWS), weights=jax.numpy.ones(tiny.ROWS))
    return tiny.Problem(make_loss, batch, None, {}, start=lambda: (model, params))


def meshes(axes: tuple[str, ...], sizes: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Each axis alone for all sizes but the last, of which every factorisation."""
    *small, last = sizes
    for size, axis in itertools.product(small, axes):
        yield {axis: size}
    powers = [2**k for k in range(last.bit_length())]
    for chosen in itertools.product(powers, repeat=len(axes)):
        if math.prod(chosen) == last:
            yield {axis: n for axis, n in zip(axes, chosen) if n > 1} or {axes[0]: 1}


def learn(problem: tiny.Problem, axes: dict[str, int]) -> tuple[list[float], dict[str, float]]:
    """The losses of three updates on a mesh, and bytes of a device; checks that everything lies by the rules.

    Raises:
      AssertionError: naming the leaf that lies elsewhere, or the bytes that do not fall.
    """
    model, params = problem.start()
    mesh = sharding.make_mesh(jax.devices()[: math.prod(axes.values())], **axes)
    optimizer = optax.adamw(1e-3)
    state = sharding.born_sharded(lambda p: train.TrainState.create(p, optimizer), mesh, models.RULES)(params)
    batch = sharding.shard_batch(problem.batch, mesh)
    frozen = jax.device_put(problem.frozen, sharding.shardings(problem.frozen, mesh, models.RULES))
    statistics = problem.statistics and problem.statistics(model)
    update = train.make_update(problem.make_loss(model), optimizer, statistics=statistics)
    losses = []
    with jax.set_mesh(mesh):
        step = jax.jit(update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
        compiled = step.lower(state, batch, frozen, problem.hyper).compile()  # as `sharding.in_place` does
        for _ in range(3):
            state, metrics = compiled(state, batch, frozen, problem.hyper)
            losses.append(float(metrics["loss"]))
    lies_by_the_rules(state, mesh)
    given = held((state, batch, frozen)) + 4 * len(problem.hyper)
    analysis = compiled.memory_analysis()
    assert analysis is not None, "the compiler says nothing of memory"
    read = analysis.argument_size_in_bytes
    assert read <= 1.02 * given + 1024, f"the program takes {read} bytes of a device; expected {given}"
    return losses, {"state": held(state), "read": read}


def lies_by_the_rules(state: Any, mesh: jax.sharding.Mesh) -> None:
    """Parameters and moments after updates are where the rules want them, and split leaves are split by all of it."""
    wanted = sharding.shardings(state, mesh, models.RULES)

    def check(path, leaf, where):
        name = sharding.path_name(path)
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim), f"{name} lies {leaf.sharding}; expected {where}"
        parts = math.prod(mesh.shape[axis] for axis in _axes(where.spec))
        shard = leaf.addressable_shards[0].data.nbytes
        assert shard * parts == leaf.nbytes, f"{name}: {shard} bytes in one of {parts} parts of {leaf.nbytes}"
        return leaf.nbytes

    jax.tree_util.tree_map_with_path(check, state, wanted)


def held(tree: Any) -> int:
    """Bytes that the first device has of a tree."""
    first = [x.addressable_shards[0].data for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    return sum(x.nbytes for x in first)


def _axes(spec: jax.sharding.PartitionSpec) -> list[str]:
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    return [axis for entry in entries for axis in entry]


def main(config: Config) -> None:
    """Tries every algorithm on every mesh, and writes what was seen."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    known = {**tiny.problems(), "mixture": mixture()}
    with config.output.open("w") as lines:
        for name in config.algorithms or known:
            expected, alone = learn(known[name], {"data": 1})
            axes = MIXED if name == "mixture" else DENSE
            found = {"algorithm": name, "meshes": 0, "apart": 0.0, "bytes": {"1": alone["state"]}, "failed": {}}
            for shape in list(meshes(axes, config.sizes))[:: config.every]:
                try:
                    losses, size = learn(known[name], shape)
                except Exception as error:
                    found["failed"][str(shape)] = f"{type(error).__name__}: {error}"[:300]
                    continue
                found["meshes"] += 1
                apart = float(np.max(np.abs(np.subtract(losses, expected)) / np.maximum(1, np.abs(expected))))
                found["apart"] = max(found["apart"], apart)
                if not apart <= 1e-5:
                    found["failed"][str(shape)] = f"losses {losses}; expected {expected}"
                parts = math.prod(shape.get(axis, 1) for axis in SPLIT)
                found["bytes"][str(parts)] = max(size["state"], found["bytes"].get(str(parts), 0))
            lines.write(json.dumps(found) + "\n")
            lines.flush()
            jax.clear_caches()
