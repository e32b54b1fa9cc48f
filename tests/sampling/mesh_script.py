"""Run by mesh_test.py in a process with eight simulated devices: sharded sampling against one device, as JSON."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from parameters import drawn

from alignax import models, sharding
from alignax.sampling import Samples, collect, generate, make_engine, serve

CONFIG = models.TransformerConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
    initializer_range=0.3,
)
ROWS, GROUP, NEW = 8, 2, 10
MOVES = r"%[\w.\-]+ = (.*?) (all-gather|all-to-all|collective-permute|all-gather-start|collective-permute-start)\("


def inside_loops(text):
    """The lines of all computations that loops reach."""
    blocks = {}
    for block in re.split(r"\n(?=%|ENTRY)", text):
        if name := re.match(r"(?:ENTRY )?%?([\w.\-]+)", block):
            blocks[name.group(1)] = block
    waiting, seen = set(re.findall(r"body=%?([\w.\-]+)", text)), set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        block = blocks.get(name, "")
        called = re.findall(r"(?:to_apply|calls|body|condition|\w+_computation)=%?([\w.\-]+)", block)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", block):
            called += [part.strip().lstrip("%") for part in group.split(",")]
        waiting |= set(called) - seen
    return [line for name in sorted(seen) for line in blocks.get(name, "").split("\n")]


def moved(text):
    """[elements, operation of the source] of every collective in a loop that moves what is not a sum."""
    found = []
    for line in inside_loops(text):
        if match := re.search(MOVES, line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match.group(1))
            sizes = [int(np.prod([int(x) for x in shape.split(",") if x])) for shape in shapes]
            source = re.search(r'op_name="([^"]*)"', line)
            found.append([max(sizes), source.group(1) if source else ""])
    return found


def main():
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = sharding.make_mesh(data=4, tensor=2)
    model, rng = models.transformer(CONFIG), np.random.default_rng(0)
    params = drawn(model)
    prompts = jnp.asarray(rng.integers(0, 512, (ROWS, 6)), jnp.int32)
    lengths = jnp.asarray([6, 1, 3, 4, 5, 2, 6, 3], jnp.int32)
    placed = jax.device_put(params, sharding.shardings(params, mesh, models.RULES))
    batch = sharding.shard_batch((prompts, lengths), mesh)
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=NEW, group=GROUP))
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    ends = {"eos_ids": jnp.array([2]), "stop": jnp.array([[7, 8], [-1, 9]])}
    many = sample.lower(placed, *batch, jax.random.key(0), **off, **ends).compile()  # both ways to choose lie in it
    report = {"moved": moved(many.as_text())}
    on = {"top_k": 40, "top_p": 0.9, "min_p": 1e-3, "repetition_penalty": 1.3}
    for name, setting in (("plain", off), ("bent", on)):
        # waited for: beside a second program the simulated devices may starve one another in a collective
        found = jax.block_until_ready(many(placed, *batch, jax.random.key(0), **setting, **ends))
        one = jax.block_until_ready(sample(params, prompts, lengths, jax.random.key(0), **setting, **ends))
        for field in ("tokens", "segments", "mask", "lengths", "truncated"):
            np.testing.assert_array_equal(getattr(found, field), getattr(one, field), err_msg=field)
        assert len({tuple(row) for row in found.tokens.tolist()}) == ROWS * GROUP
        pairs = ((found.logp, one.logp), (found.processed_logp, one.processed_logp))
        report[name] = {
            "logp": max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs),
            "sharded": [field for field, x in zip(Samples._fields, found) if x.sharding.spec == P("data")],
        }
    place = functools.partial(sharding.shard_batch, mesh=mesh)
    engine = make_engine(model, slots=ROWS, buckets=(6,), max_new_tokens=NEW, group=GROUP, block=3, place=place)
    asked = np.asarray(prompts)[::-1], np.asarray(lengths)[::-1]
    ids = np.arange(ROWS * GROUP).reshape(ROWS, GROUP)[::-1].reshape(-1)
    served = collect(serve(engine, placed, *asked, jax.random.key(0), row_ids=ids, **on, **ends))
    np.testing.assert_array_equal(served.tokens[np.argsort(ids)], one.tokens)
    report["engine"] = float(np.max(np.abs(served.logp[np.argsort(ids)] - np.asarray(one.logp))))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
