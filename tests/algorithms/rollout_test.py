"""What the sampler says of its tokens, what the trainer says of them, and the ratio between the two."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import small, tiny

from alignax import sampling, train
from alignax.algorithms import grpo
from alignax.data import text
from alignax.io import hf
from alignax.logprobs import token_logprobs


def compiled(model, *, group, new_tokens):
    """The sampler, the trainer's log-probabilities with the first minibatch, and the update on it, compiled."""
    optimizer = optax.sgd(0.1)
    update = train.make_update(grpo.make_loss(model, kl=None), optimizer, microbatches=2)
    options = {"max_new_tokens": new_tokens, "group": group, "eos_ids": (1, 2)}

    @jax.jit
    def experience(params, samples, temperature):
        rows = (samples.tokens, samples.segments)
        logp = token_logprobs(model, params, *rows, mask=samples.mask, temperature=temperature)
        advantages = jax.random.normal(jax.random.key(1), (len(samples.tokens),))
        batch = grpo.Batch(*rows, samples.mask, advantages, old_logp=logp)
        return logp, next(train.minibatches(jax.random.key(2), batch, 2))

    @jax.jit
    def learn(params, part, temperature):
        return update(train.TrainState.create(params, optimizer), part, None, {"temperature": temperature})[1]

    return jax.jit(partial(sampling.generate, model, **options)), experience, learn


def rollout(programs, params, prompts, lengths, *, temperature):
    """Samples, the trainer's log-probabilities of them, and the first minibatch's metrics."""
    generate, experience, learn = programs
    samples = generate(params, prompts, lengths, jax.random.key(0), temperature=temperature)
    logp, part = experience(params, samples, temperature)
    return jax.tree.map(np.asarray, (samples, logp, learn(params, part, temperature)))


@functools.cache
def of_tiny():
    return compiled(tiny()[0], group=4, new_tokens=40)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_trainer_and_first_ratio_agree(temperature):
    _, params = tiny()
    rng = np.random.default_rng(0)
    lengths = np.array([1, 7, 4, 12, 2, 9, 12, 3])
    prompts = np.where(np.arange(12) < lengths[:, None], rng.integers(3, 32, (8, 12)), 0)
    samples, logp, metrics = rollout(of_tiny(), params, prompts, lengths, temperature=temperature)
    assert int(samples.mask.sum()) > 300
    np.testing.assert_allclose(samples.logp, logp, rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio/max"], 1.0, rtol=0, atol=1e-5)


def test_a_real_model(shared):
    """Its logits reach from -21 to 25, so float32 itself rounds log-probabilities by up to 1.2e-5 (against float64)."""
    loaded = hf.load(shared / "models" / "stories260K-hf")
    prompts, lengths = text.encode(loaded.tokenizer, ["Once upon a time", "One day, a little girl named Lily", "Tom"])
    programs = compiled(loaded.model, group=4, new_tokens=100)
    samples, logp, metrics = rollout(programs, loaded.params, prompts, lengths, temperature=1.0)
    difference = np.abs(samples.logp - logp)[samples.mask]
    assert difference.mean() < 2e-6 and difference.max() < 2e-5, (difference.mean(), difference.max())
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio/max"], 1.0, rtol=0, atol=2e-5)


def test_a_batch_without_old_logp_has_ratio_1_and_the_gradient_of_reinforce():
    model, params = small()
    tokens = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)
    mask = np.broadcast_to(np.arange(9) >= 3, (4, 9))
    advantages = np.array([1.0, -2.0, 0.5, 0.0], np.float32)
    batch = grpo.Batch(*map(jnp.asarray, (tokens, np.ones((4, 9), np.int32), mask, advantages)))
    loss_fn = grpo.make_loss(model, kl=None)

    def ours(params):
        terms, metrics = loss_fn(params, batch, None, {})
        return terms["policy"].mean.value(), {name: metric.value() for name, metric in metrics.items()}

    def reinforce(params):
        logp = token_logprobs(model, params, batch.tokens, batch.segments, mask=batch.mask)
        return -jnp.mean(jnp.sum(logp, axis=1) / 6 * advantages)

    both = jax.jit(lambda params: (jax.value_and_grad(ours, has_aux=True)(params), jax.grad(reinforce)(params)))
    ((value, metrics), gradient), expected = jax.tree.map(np.asarray, both(params))
    np.testing.assert_allclose(value, -np.mean(advantages), rtol=1e-6)
    assert metrics["ratio"] == 1 and metrics["ratio/max"] == 1
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6 * largest), gradient, expected)
