"""Rows that enter a network together against the same rows alone; `algorithms/common_test.py` has the updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from problems import tiny

from alignax import layouts, models
from alignax.logprobs import last_score, token_logprobs, token_values
from alignax.models import attention, shared, tiled
from alignax.models.config import LayerKind

WIDTH, MEMBERS, LENGTH = 4, 3, 11


@functools.cache
def rows():
    """Two bundles: prompts of 4 and of 2 tokens, completions of 0 to 7, of which two begin alike; a row of padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (2, MEMBERS, LENGTH)).astype(np.int32)
    tokens[0, :, :4] = tokens[0, :1, :4]
    tokens[1, :, :3] = tokens[1, :1, :3]  # the prompt has 2, and all go on with the same token
    lengths = np.array([[4 + 7, 4, 4 + 3], [2 + 7, 0, 2 + 4]])
    segments = np.arange(LENGTH) < lengths[..., None]
    mask = segments & (np.arange(LENGTH) >= np.array([4, 2])[:, None, None])
    return [x.reshape(-1, LENGTH) for x in (tokens, segments, mask)]


def variants():
    config = tiny()[0].config
    assert config is not None
    return {
        "windows": dataclasses.replace(config, pattern=(LayerKind(window=3), LayerKind())),
        "learned": dataclasses.replace(config, learned_positions=True, layer_norm=True, gated_mlp=False),
        "mixture": dataclasses.replace(config, mixture=True, num_experts=3, experts_per_token=2),
        "softcap": dataclasses.replace(config, attention_softcap=2.0, qk_norm=True),
    }


@functools.cache
def variant(name):
    model = models.transformer(variants()[name])
    return model, drawn(model, scale=0.2)


@pytest.mark.parametrize("name", ["windows", "learned", "mixture", "softcap"])
def test_every_kind_of_decoder(name):
    model, params = variant(name)
    tokens, segments, mask = map(jnp.asarray, rows())

    @jax.jit
    def of(params):
        forms = (
            model,
            layouts.shared_prompt(model, width=WIDTH, members=MEMBERS),
            layouts.packed(model, width=30, members=MEMBERS),
        )
        return [token_logprobs(form, params, tokens, segments, mask=mask) for form in forms]

    alone, shared, packed = of(params)
    assert np.count_nonzero(alone) == np.count_nonzero(mask) == 20 + 7 - 3 - 3
    np.testing.assert_allclose(shared, alone, atol=2e-6)
    np.testing.assert_allclose(packed, alone, atol=2e-6)


@pytest.mark.parametrize("name", ["windows", "softcap"])
def test_long_rows_go_by_tiles(name, monkeypatch):
    """Tiles of 3 queries, which divide neither the prompt's 4 columns nor the completions' 7; gradients too."""
    model, params = variant(name)
    tokens, segments, mask = map(jnp.asarray, rows())
    weights = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    tiles, in_tiles = [], tiled.in_tiles
    monkeypatch.setattr(shared, "LONG", WIDTH + 7)
    monkeypatch.setattr(shared, "SIZE", 3)
    monkeypatch.setattr(tiled, "in_tiles", lambda x, size: tiles.append(size) or in_tiles(x, size))

    @jax.jit
    def of(params):
        forms = model, layouts.shared_prompt(model, width=WIDTH, members=MEMBERS)
        return [
            jax.value_and_grad(lambda p: jnp.sum(weights * token_logprobs(form, p, tokens, segments, mask=mask)))(
                params
            )
            for form in forms
        ]

    (alone, of_alone), (together, of_together) = of(params)
    assert set(tiles) == {3}
    np.testing.assert_allclose(together, alone, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), of_together, of_alone)


def test_values_and_last_scores():
    model, params = tiny()
    params = models.add_score(model, params, jax.random.key(1))
    tokens, segments, _ = map(jnp.asarray, rows())
    alone = models.with_score(model)

    @jax.jit
    def of(params):
        forms = (
            alone,
            layouts.shared_prompt(alone, completion=LENGTH - WIDTH, members=MEMBERS),
            layouts.packed(alone, width=30, members=MEMBERS),
        )
        found = []
        for form in forms:
            hidden = form.hidden(params, tokens, segments)  # once for both
            known = form._replace(hidden=lambda *_, hidden=hidden: hidden)
            found.append([read(known, params, tokens, segments) for read in (last_score, token_values)])
        return found

    expected, *others = of(params)
    assert all(np.count_nonzero(x) >= 5 for x in expected)
    for found in others:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_bundle_that_does_not_fit_is_not_a_number():
    """Loud: the update is then left out and counted. The other bundle is as it was."""
    model, params = tiny()
    tokens, segments, mask = map(jnp.asarray, rows())

    @jax.jit
    def of(params):
        forms = (
            model,
            layouts.packed(model, width=20, members=MEMBERS),  # 22 tokens and 15
            layouts.shared_prompt(model, width=5, members=MEMBERS),  # at most 6 behind prompts of 4, where 7 are
        )
        return [token_logprobs(form, params, tokens, segments, mask=mask) for form in forms]

    alone, *others = map(np.asarray, of(params))
    for found in others:
        first, second = np.split(found, 2)
        assert np.isnan(first[np.asarray(mask)[:3]]).all()
        np.testing.assert_allclose(second, alone[3:], atol=2e-6)


def test_quarters_of_a_long_row_equal_the_whole():
    rng = np.random.default_rng(0)
    length = attention.QUARTERED + 3
    q, k, v = (rng.normal(size=(2, length, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.sort(rng.integers(0, 4, (2, length)), axis=1)
    seen = (segments[:, :, None] == segments[:, None]) & np.tril(np.ones((length, length), bool))

    @jax.jit
    def both(q, k, v, seen):
        cache = attention.as_cache(k, v)
        return [attend(q, cache, seen, softcap=3.0) for attend in (attention.attend_rows, attention.attend)]

    np.testing.assert_allclose(*both(q, k, v, seen), atol=1e-6)


def test_gain():
    assert layouts.shared_prompt_gain(512, 64, 8) == 8 * 576 / 1024  # 4.5


def test_what_makes_no_layout_is_refused():
    model, params = tiny()
    tokens, segments, _ = map(jnp.asarray, rows())
    with pytest.raises(ValueError, match=r"layouts\.packed: members=0; expected at least 1"):
        layouts.packed(model, width=8, members=0)
    with pytest.raises(ValueError, match=r"6 rows; expected bundles of members=4"):
        layouts.packed(model, width=8, members=4).hidden(params, tokens, segments)
    with pytest.raises(ValueError, match=r"width=None, completion=None; expected one of them"):
        layouts.shared_prompt(model, members=2)
    with pytest.raises(ValueError, match=r"hidden takes \['params', 'tokens', .*; expected `prompt` among them"):
        layouts.shared_prompt(models.from_apply(lambda params, tokens, segments: tokens), members=2, width=4)
    with pytest.raises(ValueError, match=r"rows of 11 tokens; width=11"):
        layouts.shared_prompt(model, members=2, width=11).hidden(params, tokens, segments)
    with pytest.raises(ValueError, match=r"\['positions'\] were given"):
        layouts.packed(model, width=8, members=2).hidden(params, tokens, segments, positions=tokens)
    with pytest.raises(ValueError, match=r"it has no cache for 4 rows"):
        layouts.packed(model, width=8, members=2).init_cache(4, 8)
    with pytest.raises(ValueError, match=r"rows of 11 tokens, prompt=\(4, 3\); expected a prompt"):
        model.hidden(params, tokens, segments, positions=tokens, prompt=(4, 3))
