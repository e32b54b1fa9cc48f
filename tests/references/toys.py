"""Models whose distributions are known in closed form: nothing here but arithmetic on tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Hidden, Model


@functools.cache
def chain():
    """A Markov chain: params is the table [V, V] of logits of the next token given the last."""

    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        return Hidden(params[tokens], cache, {})

    return Model(
        init=lambda key: jax.random.normal(key, (5, 5)),
        hidden=hidden,
        logits=lambda params, states: states,
        init_cache=lambda batch, length: jnp.zeros((batch, length)),
    )


@functools.cache
def history(size=7, seed=0):
    """A model that looks at everything: logits = sum over slots s <= position of table[token in slot s] * cos(s).

    All it knows comes from its cache, so a slot that is wrong, late or missing changes its logits, and a position out
    of bounds makes them NaN. Returns the model, its parameters, and in numpy: row -> the logits behind it.
    """
    table = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)

    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        rows, length, _ = cache["slots"].shape
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        slots = cache["slots"].at[jnp.arange(rows)[:, None], positions].set(params[tokens], mode="drop")
        index = jnp.arange(length)
        weighted = slots * jnp.cos(index.astype(jnp.float32))[None, :, None]
        seen = index[None, None] <= positions[..., None]
        states = jnp.sum(jnp.where(seen[..., None], weighted[:, None], 0.0), axis=2)
        return Hidden(jnp.where(positions[..., None] < length, states, jnp.nan), {"slots": slots}, {})

    model = Model(
        init=lambda key: jnp.asarray(table),
        hidden=hidden,
        logits=lambda params, states: states,
        init_cache=lambda batch, length: {"slots": jnp.full((batch, length, size), jnp.nan)},
    )

    def reference(row):
        return np.sum(table[row].astype(np.float64) * np.cos(np.arange(len(row)))[:, None], axis=0)

    return model, jnp.asarray(table), reference


def log_softmax(logits):
    """In float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
