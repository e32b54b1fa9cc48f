"""What the sampler says of its tokens, what the trainer says of them, and the ratio between the two."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import tiny

from alignax import sampling, train
from alignax.algorithms import grpo
from alignax.data import text
from alignax.io import hf
from alignax.logprobs import token_logprobs


def rollout(model, params, prompts, lengths, *, group, new_tokens, temperature):
    """Samples, the trainer's log-probabilities of them, and the first minibatch's metrics."""
    generate = jax.jit(partial(sampling.generate, model, max_new_tokens=new_tokens, group=group, eos_ids=(1, 2)))
    samples = generate(params, prompts, lengths, jax.random.key(0), temperature=temperature)
    rows = (samples.tokens, samples.segments)
    logp = jax.jit(partial(token_logprobs, model))(params, *rows, mask=samples.mask, temperature=temperature)
    advantages = jax.random.normal(jax.random.key(1), (len(samples.tokens),))
    batch = grpo.Batch(*rows, samples.mask, advantages, old_logp=logp)
    optimizer = optax.sgd(0.1)
    update = jax.jit(train.make_update(grpo.make_loss(model, kl=None), optimizer, microbatches=2))
    part = next(train.minibatches(jax.random.key(2), batch, 2))
    _, metrics = update(train.TrainState.create(params, optimizer), part, None, {"temperature": temperature})
    return samples, logp, metrics


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_trainer_and_first_ratio_agree(temperature):
    model, params = tiny()
    rng = np.random.default_rng(0)
    lengths = np.array([1, 7, 4, 12, 2, 9, 12, 3])
    prompts = np.where(np.arange(12) < lengths[:, None], rng.integers(3, 32, (8, 12)), 0)
    samples, logp, metrics = rollout(model, params, prompts, lengths, group=4, new_tokens=40, temperature=temperature)
    assert int(samples.mask.sum()) > 300
    np.testing.assert_allclose(samples.logp, logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio/max"], 1.0, rtol=0, atol=1e-5)


def test_a_real_model(shared):
    """Its logits reach from -21 to 25, so float32 itself rounds log-probabilities by up to 1.2e-5 (against float64)."""
    loaded = hf.load(shared / "models" / "stories260K-hf")
    prompts, lengths = text.encode(loaded.tokenizer, ["Once upon a time", "One day, a little girl named Lily", "Tom"])
    samples, logp, metrics = rollout(
        loaded.model, loaded.params, prompts, lengths, group=4, new_tokens=100, temperature=1.0
    )
    difference = np.abs(np.asarray(samples.logp - logp))[np.asarray(samples.mask)]
    assert difference.mean() < 2e-6 and difference.max() < 2e-5, (difference.mean(), difference.max())
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio/max"], 1.0, rtol=0, atol=2e-5)


def test_a_batch_without_old_logp_has_ratio_1_and_the_gradient_of_reinforce():
    model, params = tiny()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 9)))
    mask = jnp.arange(9) >= 3
    advantages = jnp.array([1.0, -2.0, 0.5, 0.0])
    batch = grpo.Batch(tokens, jnp.ones((4, 9), jnp.int32), jnp.broadcast_to(mask, (4, 9)), advantages)
    loss_fn = grpo.make_loss(model, kl=None)

    def ours(params):
        terms, metrics = loss_fn(params, batch, None, {})
        return terms["policy"].mean.value(), metrics

    def reinforce(params):
        logp = token_logprobs(model, params, tokens, batch.segments, mask=batch.mask)
        return -jnp.mean(jnp.sum(logp, axis=1) / 6 * advantages)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    np.testing.assert_allclose(value, -jnp.mean(advantages), rtol=1e-6)
    assert metrics["ratio"].value() == 1 and metrics["ratio/max"].value() == 1
    expected = jax.jit(jax.grad(reinforce))(params)
    largest = max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), gradient, expected)
