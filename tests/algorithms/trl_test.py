"""Ten updates of a real model against TRL 1.16, which logged them (spec/oracles/trl_sft_dpo.json)."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import losses, train
from alignax.algorithms import preference, sft
from alignax.io import hf


@pytest.fixture(scope="module")
def oracle(shared):
    return json.loads((shared / "spec" / "oracles" / "trl_sft_dpo.json").read_text())


@pytest.fixture(scope="module")
def loaded(shared):
    return hf.load(shared / "models" / "stories260K-hf")


def trainer(oracle, loss_fn):
    """`run(params, batch, frozen, hyper, steps)`: the metrics before each update, as TRL logs them.

    AdamW after a clip to norm 1, constant rate, full batch.
    """
    rate, (b1, b2) = oracle["optim"]["lr"], oracle["optim"]["betas"]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1, b2, 1e-8, weight_decay=0.0))
    # ten steps of a real model take longer to run than to compile
    compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
    update, start = compiled(train.make_update(loss_fn, optimizer, microbatches=2)), jax.jit(optimizer.init)

    def run(params, batch, frozen, hyper, steps):
        state = train.TrainState.create(params, optimizer._replace(init=start))
        for _ in range(steps):
            state, metrics = update(state, batch, frozen, hyper)
            yield metrics

    return run


@pytest.fixture(scope="module")
def run_pairs(oracle, loaded):
    """One program for both losses: most of it is the network."""

    def either(chosen, rejected, *, average, beta):
        ipo, dpo = losses.ipo_average(chosen, rejected, beta=beta), losses.dpo(chosen, rejected, beta=beta)
        return jnp.where(average, ipo, dpo)

    return trainer(oracle, preference.make_loss(loaded.model, loss=either))


def test_sft(oracle, loaded):
    batch = {name: np.array(value) for name, value in oracle["sft"]["batch"].items()}
    rows = sft.Batch(batch["input_ids"].astype(np.int32), batch["attention_mask"], batch["labels"] != -100)
    logged = oracle["sft"]["nll"]["steps"]
    loss_fn = sft.make_loss(loaded.model)
    found = trainer(oracle, loss_fn)(loaded.params, rows, None, {}, len(logged))
    for metrics, theirs in zip(found, logged, strict=True):
        np.testing.assert_allclose(metrics["loss"], theirs["loss"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], theirs["grad_norm"], rtol=1e-3)
        np.testing.assert_allclose(metrics["mean_token_accuracy"], theirs["mean_token_accuracy"], atol=5e-3)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_dpo(oracle, loaded, run_pairs, loss):
    batch = {name: np.array(value, np.int32) for name, value in oracle["dpo"]["batch"].items()}
    pairs = len(batch["input_ids"]) // 2  # TRL stacks all chosen rows on all rejected ones
    tokens, segments, mask = (
        batch[name].reshape(2, pairs, -1).swapaxes(0, 1) for name in ("input_ids", "attention_mask", "completion_mask")
    )
    # the reference is the model with the q and k projections of every layer scaled by 0.9
    reference = jax.tree.map(np.array, loaded.params)
    for projection in ("q", "k"):
        reference["layers"]["attn"][projection]["kernel"] *= 0.9
    logged = oracle["dpo"][loss]["steps"]
    hyper = {"average": loss == "ipo", "beta": oracle["dpo"][loss]["beta"]}
    pairs = preference.Batch(tokens, segments, mask)
    found = run_pairs(loaded.params, pairs, {"reference": reference}, hyper, len(logged))
    for metrics, theirs in zip(found, logged, strict=True):
        scale = max(1.0, abs(theirs["loss"]))
        np.testing.assert_allclose(metrics["loss"], theirs["loss"], rtol=0, atol=1e-4 * scale)
        for key in ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            np.testing.assert_allclose(metrics[key], theirs[key], rtol=0, atol=1e-3, err_msg=key)
        np.testing.assert_allclose(metrics["rewards/accuracies"], theirs["rewards/accuracies"], atol=1e-6)
