"""Fine-tuning a mixture of experts with its router's losses, whole and in micro-batches."""

import functools

import jax
import numpy as np
import optax
import pytest
from problems import rows, small

from alignax import models, train
from alignax.algorithms import expert_load, sft

WEIGHTS = {"aux_weight": 0.5, "z_weight": 0.01}


@functools.cache
def mixture():
    config = models.TransformerConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        initializer_range=0.2,
        mixture=True,
        num_experts=4,
        remat=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    )
    model = models.transformer(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def batch():
    weights = np.ones(8, np.float32)
    weights[3] = 0
    return sft.Batch(**rows(8), weights=weights)


@functools.cache
def compiled(microbatches):
    """The optimizer, whose state holds the learning rate, and the update; the load is that of the whole batch."""
    model, _ = mixture()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)
    statistics = expert_load(model) if microbatches > 1 else None
    loss = sft.make_loss(model, **WEIGHTS)
    return optimizer, jax.jit(train.make_update(loss, optimizer, microbatches=microbatches, statistics=statistics))


def updated(microbatches, steps=1, learning_rate=0.1):
    _, params = mixture()
    optimizer, update = compiled(microbatches)
    state, found = train.TrainState.create(params, optimizer), []
    state.opt_state.hyperparams["learning_rate"] = np.float32(learning_rate)
    for _ in range(steps):
        state, metrics = update(state, batch())
        found.append(metrics)
    return jax.tree.map(np.asarray, (state.params, found))


def test_micro_batches_with_the_load_of_the_whole_batch_are_one_batch():
    (whole, metrics), (split, others) = updated(1), updated(4)
    assert metrics[0].keys() == others[0].keys() >= {"loss/load_balancing", "loss/router_z", "loss/nll"}
    for name, value in metrics[0].items():
        np.testing.assert_allclose(others[0][name], value, rtol=2e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), split, whole)


def test_training_lowers_the_losses_and_moves_the_router():
    _, params = mixture()
    trained, metrics = updated(1, steps=12, learning_rate=0.3)
    for name in ("loss/nll", "loss/load_balancing"):
        assert metrics[-1][name] < metrics[0][name], name
    assert all(np.isfinite(value) for found in metrics for value in found.values())
    before, after = (np.asarray(x["layers"]["mlp"]["router"]["kernel"]) for x in (params, trained))
    moved = np.abs(after - before)
    assert (moved.max((1, 2)) > 1e-3).all()


def test_weights_are_hyperparameters_and_terms_are_left_out_without_them():
    model, params = mixture()
    terms, _ = jax.eval_shape(lambda batch: sft.make_loss(model)(params, batch, None, {}), batch())
    assert set(terms) == {"nll"}
    hyper = {"aux_weight": 7.0, "z_weight": 3.0}
    terms, _ = jax.jit(lambda batch: sft.make_loss(model, aux_weight=0.1)(params, batch, None, hyper))(batch())
    assert (terms["load_balancing"].weight, terms["router_z"].weight) == (7.0, 3.0)
    counted = batch().segments[batch().weights != 0].sum()
    assert terms["load_balancing"].mean.count == terms["router_z"].mean.count == 2 * counted


def test_a_model_without_a_router_is_refused():
    model, params = small()
    with pytest.raises(ValueError, match="the model has no router"):
        jax.eval_shape(lambda batch: sft.make_loss(model, aux_weight=0.1)(params, batch, None, {}), batch())
