"""What the benchmarks of updates share: random pairs and rollouts, one compiled update, the operations it must do."""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignax import layouts, train
from alignax.algorithms import grpo, preference, sft
from alignax.models import remat
from alignax.types import LossFn, Model, Params


class Update(NamedTuple):
    """A compiled update with its state inside."""

    step: Callable[..., dict]  # (batch) -> metrics, waits for the device
    params: Callable[[], Params]  # as they are now
    temporary_bytes: int
    compile_seconds: float


def add_options(parser: argparse.ArgumentParser) -> None:
    """How our updates are run; the keeping of dots was fastest on two cores, by 2 to 4 % over nothing."""
    parser.add_argument("--remat", default="dots", help="what the forward pass keeps, see `policy` (default: dots)")
    parser.add_argument("--microbatches", type=int, default=1, help="parts of a batch (default: 1)")


def policy(name: str) -> Any:
    """None for "none", a policy of `models.remat` for "dots" and "nothing", else names to keep: "qkv+attended"."""
    if name == "none":
        return None
    return {"dots": remat.dots, "nothing": remat.nothing}.get(name) or remat.keep(*name.split("+"))


def compiled(loss_fn: LossFn, params: Params, batch: Any, frozen: Any = None, *, microbatches: int = 1) -> Update:
    """AdamW on `loss_fn`, the state donated. `params` are copied, so that a reference may be the same arrays."""
    optimizer = optax.adamw(1e-6)
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=microbatches), donate_argnums=0)
    state = train.TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
    start = time.perf_counter()
    program = update.lower(state, batch, frozen).compile()
    compiling = time.perf_counter() - start
    memory = program.memory_analysis()

    def step(batch: Any = batch) -> dict:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, batch, frozen))
        return metrics

    return Update(step, lambda: state.params, 0 if memory is None else memory.temp_size_in_bytes, compiling)


def dpo(model: Model, *, shared: int = 0) -> LossFn:
    """DPO; with `shared` the prompt of a pair, of so many columns, runs once."""
    return preference.make_loss(layouts.shared_prompt(model, width=shared, members=2) if shared else model)


def group_policy(model: Model, *, shared: int = 0, group: int = 1) -> LossFn:
    """GRPO of batches whose leaves lead with [prompts, group]; with `shared` a group's prompt runs once."""
    model = layouts.shared_prompt(model, width=shared, members=group) if shared else model
    return layouts.bundled(grpo.make_loss(model, kl_weight=0.04))


def texts(vocab: int, count: int, length: int) -> sft.Batch:
    """Random rows without a prompt."""
    tokens = jax.random.randint(jax.random.key(1), (count, length), 0, vocab)
    return sft.Batch(tokens, jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, bool))


def pairs(vocab: int, count: int, prompt: int, completion: int) -> preference.Batch:
    """Random pairs that fill their rows. Boolean segments say so, which lets attention choose kernels for it."""
    tokens, mask = _rows(vocab, count, 2, prompt, completion)
    return preference.Batch(tokens, jnp.ones(tokens.shape, bool), mask)


def groups(vocab: int, prompts: int, group: int, prompt: int, completion: int) -> grpo.Batch:
    """Random groups that fill their rows, leaves [prompts, group, ...]."""
    tokens, mask = _rows(vocab, prompts, group, prompt, completion)
    advantages = jax.random.normal(jax.random.key(2), (prompts, group))
    return grpo.Batch(tokens, jnp.ones(tokens.shape, bool), mask, advantages)


def operations(shape: dict[str, int], fed: int, scored: int, passes: int) -> int:
    """2 x parameters used x tokens x passes: the layers' for tokens fed, the head's for tokens scored. No attention."""
    projections = 2 * shape["head_dim"] * (shape["heads"] + shape["kv_heads"]) + 3 * shape["mlp"]
    layers = shape["layers"] * shape["width"] * projections
    return 2 * passes * (layers * fed + shape["width"] * shape["vocab"] * scored)


def _rows(vocab: int, count: int, members: int, prompt: int, completion: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(1))
    prompts = jax.random.randint(keys[0], (count, 1, prompt), 0, vocab)
    own = jax.random.randint(keys[1], (count, members, completion), 0, vocab)
    tokens = jnp.concatenate([jnp.broadcast_to(prompts, (count, members, prompt)), own], axis=2)
    return tokens, jnp.broadcast_to(jnp.arange(prompt + completion) >= prompt, tokens.shape)
