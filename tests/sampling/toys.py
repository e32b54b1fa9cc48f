"""Models whose distributions are known in closed form: nothing here but arithmetic on tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Hidden, Model


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


def history(size=7, seed=0):
    """A model that looks at everything: logits = sum over slots s <= position of table[token in slot s] * cos(s).

    All it knows comes from its cache, so a slot that is wrong, late or missing changes its logits, and a position out
    of bounds makes them NaN. Returns the model, its parameters, and in numpy: row -> the logits behind it.
    """
    table = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)

    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        rows, length, _ = cache["slots"].shape
        slots = cache["slots"].at[jnp.arange(rows)[:, None], positions].set(params[tokens], mode="drop")
        seen = (jnp.arange(length) <= positions[..., None])[..., None]
        weighted = slots * jnp.cos(jnp.arange(length, dtype=jnp.float32))[None, :, None]
        states = jnp.sum(jnp.where(seen, weighted[:, None], 0.0), axis=2)
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
