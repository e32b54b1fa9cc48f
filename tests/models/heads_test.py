import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows, scored, small, tiny
from references.toys import chain

from alignax import logprobs, models

last_score, token_values, token_logprobs = (
    jax.jit(function, static_argnums=0)
    for function in (logprobs.last_score, logprobs.token_values, logprobs.token_logprobs)
)


def test_the_head_is_a_product_with_the_states():
    bare, (model, params) = small()[0], scored(small)
    batch = rows(5)
    tokens, segments = batch["tokens"], batch["segments"]
    states = jax.jit(lambda params: bare.hidden(params, tokens, segments).states)(params["backbone"])
    expected = np.asarray(states, np.float64) @ np.asarray(params["score"]["kernel"], np.float64)[:, 0]
    last = segments.sum(1) - 1
    found = last_score(model, params, tokens, segments)
    np.testing.assert_allclose(found, expected[np.arange(5), last], rtol=1e-5, atol=1e-6)
    values = token_values(model, params, tokens, segments, mask=batch["mask"])
    shifted = np.where(batch["mask"], np.roll(expected, 1, axis=1), 0.0)
    np.testing.assert_allclose(values, shifted, rtol=1e-5, atol=1e-6)
    assert values.dtype == jnp.float32


def test_values_of_packed_rows_stay_in_their_part():
    model, params = scored()
    tokens = np.arange(6)[None] + 3

    @jax.jit
    def both(params, tokens):
        packed = logprobs.token_values(model, params, tokens, jnp.asarray([[1, 1, 1, 2, 2, 2]]))
        return packed, logprobs.token_values(model, params, tokens[:, 3:], jnp.ones((1, 3), jnp.int32))

    packed, alone = map(np.asarray, both(params, tokens))
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-6)
    assert packed[0, 0] == 0 and packed[0, 3] == 0


def test_padding_does_not_reach_a_score():
    model, params = scored()
    tokens = np.array([[3, 4, 5, 31, 31], [6, 7, 8, 9, 10], [1, 1, 1, 1, 1]])
    segments = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])

    @jax.jit
    def both(params, tokens, segments):
        alone = logprobs.last_score(model, params, tokens[:1, :3], segments[:1, :3])
        return logprobs.last_score(model, params, tokens, segments), alone

    scores, alone = map(np.asarray, both(params, tokens, segments))
    np.testing.assert_allclose(scores[:1], alone, atol=1e-6)
    assert scores[2] == 0


def test_a_policy_that_is_its_own_critic_needs_one_pass():
    (bare, bare_params), (critic, critic_params) = small(), scored(small)
    model = models.with_score(bare)
    params = models.add_score(bare, bare_params, keep_head=True)
    np.testing.assert_array_equal(params["score"]["kernel"], 0)  # it begins by knowing nothing
    params["score"] = critic_params["score"]
    batch = rows(5)
    given = batch["tokens"], batch["segments"]
    scores = jax.jit(lambda *given: logprobs.score(model, *given, want=("values",)))(params, *given)
    np.testing.assert_allclose(scores.values, token_values(critic, critic_params, *given), atol=1e-6)
    np.testing.assert_array_equal(scores.logp, token_logprobs(bare, bare_params, *given))


def test_the_head_of_the_language_model_is_left_out_unless_kept():
    model, params = tiny()
    width = params["final_norm"]["scale"].shape[0]
    created = jax.eval_shape(models.with_score(model).init, jax.random.key(0))
    assert "head" not in created["backbone"] and "head" in params  # the given parameters are not changed
    assert created["score"]["kernel"].shape == (width, 1)
    assert "head" in models.add_score(model, params, keep_head=True)["backbone"]
    kernels = jax.vmap(lambda key: models.add_score(model, params, key)["score"]["kernel"])
    spread = np.std(jax.jit(lambda key: kernels(jax.random.split(key, 500)))(jax.random.key(0)))
    np.testing.assert_allclose(spread, 1 / np.sqrt(width + 1), rtol=0.05)


def test_any_model_can_have_a_head():
    model = chain()
    params = models.add_score(model, np.arange(25, dtype=np.float32).reshape(5, 5), jax.random.key(0))
    tokens = np.array([[0, 2, 4]])
    score = last_score(models.with_score(model), params, tokens, tokens * 0 + 1)
    np.testing.assert_allclose(score, [np.arange(20, 25) @ np.asarray(params["score"]["kernel"])[:, 0]], rtol=1e-6)


def test_a_missing_head_is_named():
    (bare, bare_params), (model, _) = small(), scored(small)
    tokens = np.ones((1, 3), np.int32)
    for function in (token_values, last_score):
        with pytest.raises(ValueError, match=r"no scalar head; .* is alignax.models.with_score"):
            function(bare, bare_params, tokens, tokens)
        with pytest.raises(ValueError, match=r"got parameters \['down', 'embed', .*expected 'backbone' and 'score'"):
            function(model, bare_params, tokens, tokens)
    with pytest.raises(ValueError, match="no scalar head"):
        jax.eval_shape(lambda *given: logprobs.score(bare, *given, want=("values",)), bare_params, tokens, tokens)
    with pytest.raises(ValueError, match="already has a scalar head"):
        models.with_score(model)
