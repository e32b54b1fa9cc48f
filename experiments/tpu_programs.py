"""The programs that `compile_tpu.py` compiles: real updates and the real sampler, on arrays that are only described.

Masters and AdamW's moments are float32, products bfloat16; the reference and the sampler's weights are bfloat16.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from hlo import Instruction, Module, Unknown
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignax import losses, sampling, sharding, train
from alignax.algorithms import grpo, preference, sft
from alignax.io import families
from alignax.models import RULES, TransformerConfig, remat, transformer

LLAMA = {"vocab_size": 128256, "num_kv_heads": 8, "max_positions": 131072, "rope_theta": 5e5}
# Shapes of the models' own config.json.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
    ),
    "llama-1b": dict(
        LLAMA, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, head_dim=64, tie_embeddings=True
    ),
    "llama-8b": dict(LLAMA, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, head_dim=128),
    "llama-70b": dict(LLAMA, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, head_dim=128),
    "mixtral-8x7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_positions=32768,
        rope_theta=1e6,
        mixture=True,
    ),
}
REMAT = {"nothing": remat.nothing, "dots": remat.dots, "none": None}


class Program(NamedTuple):
    """A function with the arrays it would get, and what is known of it beforehand."""

    function: Any  # jitted
    arguments: tuple  # of ShapeDtypeStructs with shardings
    kinds: dict[str, int]  # bytes on each device of what it is given
    model_flops: float  # of all devices, for one run
    rounds: Unknown  # of loops whose number of rounds depends on data


def config_of(name: str, policy: str) -> TransformerConfig:
    """The model of a name of MODELS, or of a config.json or the folder that holds it.

    policy: a name of REMAT, or names of `alignax.models.remat.NAMES` with commas: what a block keeps.
    """
    kept = REMAT[policy] if policy in REMAT else remat.keep(*policy.split(","))
    if name in MODELS:
        return TransformerConfig(**MODELS[name], dtype=jnp.bfloat16, remat=kept)
    path = pathlib.Path(name)
    source = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    return families.read_config(source, {}, dtype=jnp.float32, compute_dtype=jnp.bfloat16, remat=kept)


def make_mesh(topology: str, axes: dict[str, int]) -> Mesh:
    """A mesh of a topology's devices, neighbours of which are neighbours in the torus as far as they can be.

    Raises:
      ValueError: when the axes do not multiply to the number of devices.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(devices, **{name: axes.get(name, -1 if name == "data" else 1) for name in sharding.AXES})


@contextmanager
def on_tpu(mesh: Mesh) -> Iterator[None]:
    """The mesh in effect, and JAX's default platform what the program is for instead of what compiles it."""
    with jax.set_mesh(mesh), mock.patch.object(jax, "default_backend", lambda: "tpu"):
        yield


def update(algorithm: str, config: TransformerConfig, mesh: Mesh, *, batch: int, length: int, parts: int) -> Program:
    """The update of "sft", "dpo" or "grpo": `batch` rows, which for DPO are half as many pairs.

    The reference is read in the step.
    """
    model, optimizer = transformer(config), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    make, rows = {
        "sft": (sft.make_loss, partial(sft.Batch, *_rows(mesh, batch, length))),
        "dpo": (
            partial(preference.make_loss, loss=losses.dpo),
            partial(preference.Batch, *_rows(mesh, batch // 2, 2, length)),
        ),
        "grpo": (grpo.make_loss, partial(grpo.Batch, *_rows(mesh, batch, length), *_sampled(mesh, batch, length))),
    }[algorithm]
    state = jax.eval_shape(lambda key: train.TrainState.create(model.init(key), optimizer, key), jax.random.key(0))
    where = sharding.shardings(state, mesh, RULES)
    state, given = _placed(state, where), rows()
    frozen = None if algorithm == "sft" else {"reference": _half(state.params)}
    function = jax.jit(
        train.make_update(make(model), optimizer, microbatches=parts), donate_argnums=0, out_shardings=(where, None)
    )
    kinds = {
        "parameters": held(state.params),
        "optimizer": held(state.opt_state),
        "reference": held(frozen),
        "batch": held(given),
    }
    passes = 6 + (2 if frozen else 0)
    own = batch * length // parts // sharding.row_devices(mesh)
    flops = passes * batch * length * (_active(config) + _scores(config, length))
    return Program(function, (state, given, frozen), kinds, flops, partial(rounds, config, mesh, own))


def decode(config: TransformerConfig, mesh: Mesh, *, prompts: int, group: int, length: int, new: int) -> Program:
    """`sampling.generate`: prompts of `length` tokens, and a group of completions of `new` tokens for each."""
    config = dataclasses.replace(config, param_dtype=jnp.bfloat16, remat=None)
    model = transformer(config)._replace(rooms=None, resize=None)  # one loop, over all slots: the most there can be
    assert model.unroll is not None
    params = jax.eval_shape(lambda key: model.init(key), jax.random.key(0))
    params = _unrolled(_placed(params, sharding.shardings(params, mesh, RULES)), config.num_layers)
    rows = NamedSharding(mesh, PartitionSpec(sharding.row_axes(mesh)))
    given = (
        jax.ShapeDtypeStruct((prompts, length), jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=rows),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    function = jax.jit(
        partial(sampling.generate, model, max_new_tokens=new, group=group, eos_ids=(2,)), out_shardings=rows
    )
    tokens, width = prompts * (length + group * new), length + new / 2
    flops = 2 * tokens * _active(config) + 2 * prompts * group * new * 2 * _scores(config, width)
    flops += 2 * prompts * length * _scores(config, length)
    own = prompts * length // sharding.row_devices(mesh)
    kinds = {"parameters": held(params), "batch": held(given[:2])}
    return Program(function, (params, *given), kinds, flops, partial(rounds, config, mesh, own, steps=new))


def rounds(
    config: TransformerConfig, mesh: Mesh, tokens: int, module: Module, loop: Instruction, steps: int = 1
) -> float:
    """How often a loop runs that depends on data, when every one of a device's `tokens` counts and no row ends early.

    Raises:
      ValueError: for a loop of a file that is not known to have such.
    """
    for file in map(pathlib.PurePath, module.files(loop)):
        if file.name == "blockwise.py":  # of 2048 tokens each
            return math.ceil(tokens / 2048)
        if file.name == "moe.py":
            assignments = tokens * config.experts_per_token / mesh.shape["expert"]
            return math.ceil(assignments / 128) + config.num_experts / mesh.shape["expert"] / 2
        if file.name == "loop.py":
            return steps
    raise ValueError(f"loop {loop.name} of {module.files(loop)[:4]}: its number of rounds is not in the program")


def held(tree: Any) -> int:
    """Bytes on each device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves if x.sharding)


def _rows(mesh: Mesh, *shape: int) -> tuple:
    """Tokens, segments and mask of rows."""
    return tuple(_row(mesh, dtype, *shape) for dtype in (jnp.int32, jnp.int32, jnp.bool_))


def _sampled(mesh: Mesh, batch: int, length: int) -> tuple:
    """Advantages, and log-probabilities under the policy that sampled."""
    return _row(mesh, jnp.float32, batch), _row(mesh, jnp.float32, batch, length)


def _row(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    where = NamedSharding(mesh, PartitionSpec(sharding.row_axes(mesh)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _placed(tree: Any, where: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)


def _half(params: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding), params)


def _unrolled(params: Any, layers: int) -> Any:
    """What `Model.unroll` makes, each layer's leaves in the shards of the stack."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)

    return {**params, "layers": [jax.tree.map(one, params["layers"])] * layers}


def _active(config: TransformerConfig) -> float:
    """Parameters that multiply a token: the head's, one layer's times the layers, those of its own experts."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    mlp = config.hidden_size * config.intermediate_size * (3 if config.gated_mlp else 2)
    if config.mixture:
        mlp = mlp * config.experts_per_token + config.hidden_size * config.num_experts
    return config.num_layers * (attention + mlp) + config.hidden_size * config.vocab_size


def _scores(config: TransformerConfig, length: float) -> float:
    """The multiplications of a token with keys and values, half of the row on average."""
    return config.num_layers * config.num_heads * config.head_dim * length
