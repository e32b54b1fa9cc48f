import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows, tiny
from references.toys import chain

from alignax import logprobs, models


@pytest.fixture(scope="module")
def scored():
    model, params = tiny()
    return models.with_score(model), models.add_score(model, params, jax.random.key(1))


def test_the_head_is_a_product_with_the_states(scored):
    model, params = scored
    batch = rows(5)
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
    bare, _ = tiny()
    states = np.asarray(bare.hidden(params["backbone"], tokens, segments).states, np.float64)
    expected = states @ np.asarray(params["score"]["kernel"], np.float64)[:, 0]
    last = np.asarray(segments).sum(1) - 1
    np.testing.assert_allclose(
        logprobs.last_score(model, params, tokens, segments), expected[np.arange(5), last], rtol=1e-5, atol=1e-6
    )
    values = logprobs.token_values(model, params, tokens, segments, mask=jnp.asarray(batch["mask"]))
    shifted = np.where(batch["mask"], np.roll(expected, 1, axis=1), 0.0)
    np.testing.assert_allclose(values, shifted, rtol=1e-5, atol=1e-6)
    assert values.dtype == jnp.float32


def test_values_of_packed_rows_stay_in_their_part(scored):
    model, params = scored
    tokens = jnp.arange(6)[None] + 3
    packed = logprobs.token_values(model, params, tokens, jnp.asarray([[1, 1, 1, 2, 2, 2]]))
    alone = logprobs.token_values(model, params, tokens[:, 3:], jnp.ones((1, 3), jnp.int32))
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-6)
    assert packed[0, 0] == 0 and packed[0, 3] == 0


def test_padding_does_not_reach_a_score(scored):
    model, params = scored
    tokens = jnp.asarray([[3, 4, 5, 31, 31], [6, 7, 8, 9, 10], [1, 1, 1, 1, 1]])
    segments = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    scores = logprobs.last_score(model, params, tokens, segments)
    alone = logprobs.last_score(model, params, tokens[:1, :3], segments[:1, :3])
    np.testing.assert_allclose(scores[:1], alone, atol=1e-6)
    assert scores[2] == 0


def test_a_policy_that_is_its_own_critic_needs_one_pass(scored):
    bare, bare_params = tiny()
    model = models.with_score(bare)
    params = models.add_score(bare, bare_params, keep_head=True)
    np.testing.assert_array_equal(params["score"]["kernel"], 0)  # it begins by knowing nothing
    params["score"] = scored[1]["score"]
    batch = rows(4)
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
    scores = logprobs.score(model, params, tokens, segments, want=("values",))
    np.testing.assert_allclose(scores.values, logprobs.token_values(*scored, tokens, segments), atol=1e-6)
    np.testing.assert_array_equal(scores.logp, logprobs.token_logprobs(bare, bare_params, tokens, segments))


def test_the_head_of_the_language_model_is_left_out_unless_kept():
    model, params = tiny()
    width = params["final_norm"]["scale"].shape[0]
    created = jax.jit(models.with_score(model).init)(jax.random.key(0))
    assert "head" not in created["backbone"] and "head" in params  # the given parameters are not changed
    assert created["score"]["kernel"].shape == (width, 1)
    assert "head" in models.add_score(model, params, keep_head=True)["backbone"]
    kernels = jax.vmap(lambda key: models.add_score(model, params, key)["score"]["kernel"])
    spread = np.std(kernels(jax.random.split(jax.random.key(0), 500)))
    np.testing.assert_allclose(spread, 1 / np.sqrt(width + 1), rtol=0.05)


def test_any_model_can_have_a_head():
    model = chain()
    params = models.add_score(model, jnp.arange(25.0).reshape(5, 5), jax.random.key(0))
    tokens = jnp.asarray([[0, 2, 4]])
    score = logprobs.last_score(models.with_score(model), params, tokens, tokens * 0 + 1)
    np.testing.assert_allclose(score, [np.arange(20, 25) @ np.asarray(params["score"]["kernel"])[:, 0]], rtol=1e-6)


def test_a_missing_head_is_named(scored):
    bare, bare_params = tiny()
    model, _ = scored
    tokens = jnp.ones((1, 3), jnp.int32)
    for function in (logprobs.token_values, logprobs.last_score):
        with pytest.raises(ValueError, match=r"no scalar head; .* is alignax.models.with_score"):
            function(bare, bare_params, tokens, tokens)
        with pytest.raises(ValueError, match=r"got parameters \['embed', .*expected 'backbone' and 'score'"):
            function(model, bare_params, tokens, tokens)
    with pytest.raises(ValueError, match="no scalar head"):
        logprobs.score(bare, bare_params, tokens, tokens, want=("values",))
    with pytest.raises(ValueError, match="already has a scalar head"):
        models.with_score(model)
