"""Distillation: limits, constants, what top-k keeps, refusals."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import SIZES, Input, Properties, Row, make, real, tokenwise
from references import distillation as references

from alignax import losses

STUDENT = Input("B T V", differentiable=True, make=real)
LOGITS = {"logits": STUDENT, "teacher_logits": Input("B T V", make=real)}
DENSE = (losses.distill_forward_kl, losses.distill_reverse_kl, losses.generalised_jsd)
TOP_K = (losses.distill_top_k, losses.distill_top_k_renormalised)


def top_logp(rng, shape, scale):
    """All but the least of log-probabilities over the vocabulary, in descending order."""
    logits = scale * rng.normal(size=(*shape[:-1], shape[-1] + 1))
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.sort(-logp)[..., :-1].astype(np.float32)


def ids(rng, shape, scale):
    """Distinct tokens."""
    return np.argsort(rng.random((*shape[:-1], SIZES["V"])), axis=-1)[..., : shape[-1]].astype(np.int32)


def logits(seed, shape=(2, 3, 6)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def top_k(teacher, k):
    return jax.lax.top_k(jax.nn.log_softmax(teacher), k)


@functools.cache
def compiled(function):
    """(sum, values) and the gradient of the sum by the first array."""

    @partial(jax.value_and_grad, has_aux=True)
    def run(x, *rest):
        value = function(x, *rest)
        return jnp.sum(value), value

    return jax.jit(run)


def numbers(function, *arrays):
    """Sum, and its gradient by the first array."""
    (total, _), slope = jax.tree.map(np.asarray, compiled(function)(*arrays))
    return total, slope


def value(function, *arrays):
    """Every token's."""
    return np.asarray(compiled(function)(*arrays)[0][1])


@functools.cache
def of_top(loss, k):
    """The loss of the teacher's k likeliest tokens."""
    return lambda student, teacher, mask: loss(student, *top_k(teacher, k), mask)


@functools.cache
def jsd():
    return lambda logits, teacher, mask, beta: losses.generalised_jsd(logits, teacher, mask, beta=beta)


MASK = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("loss", DENSE)
def test_equal_distributions_cost_nothing_and_pull_nowhere(loss):
    value, slope = numbers(loss, logits(0), logits(0) + 7.0, MASK)
    np.testing.assert_allclose(value, 0.0, atol=2e-6)
    np.testing.assert_allclose(slope, np.zeros(slope.shape), atol=1e-6)


@pytest.mark.parametrize("loss", DENSE)
def test_the_teacher_is_a_constant(loss):
    slope = jax.jit(jax.grad(lambda teacher: jnp.sum(loss(jnp.asarray(logits(0)), teacher, jnp.asarray(MASK)))))(
        logits(1)
    )
    np.testing.assert_array_equal(slope, np.zeros(slope.shape))


def test_the_gradient_of_the_forward_kl_is_the_difference():
    _, slope = numbers(losses.distill_forward_kl, logits(0), logits(1), MASK)
    student, teacher = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits(0), logits(1)))
    np.testing.assert_allclose(slope, student - teacher, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta, other", [(0.0, losses.distill_forward_kl), (1.0, losses.distill_reverse_kl)])
def test_the_ends_of_the_jsd_are_the_two_kls_in_value_and_gradient(beta, other):
    expected = numbers(other, logits(0), logits(1), MASK)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        numbers(jsd(), logits(0), logits(1), MASK, beta),
        expected,
    )


def test_the_jsd_is_bounded_and_symmetric_at_a_half():
    near = value(losses.generalised_jsd, logits(0), logits(1), MASK)
    np.testing.assert_allclose(near, value(losses.generalised_jsd, logits(1), logits(0), MASK), rtol=1e-5)
    apart = value(losses.generalised_jsd, 1e4 * logits(0), 1e4 * logits(1), MASK)
    assert np.all(apart <= np.log(2) + 1e-6)


def test_the_jsd_over_beta_approaches_the_forward_kl():
    limit = value(losses.distill_forward_kl, logits(0), logits(1), MASK)
    near = value(jsd(), logits(0), logits(1), MASK, 1e-3) / 1e-3
    np.testing.assert_allclose(near, limit, rtol=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_symbol_both_hold_impossible_adds_nothing(beta):
    dead = np.float32([[[0.0, 0.0, -np.inf, 0.0, 0.0, 0.0]]])
    with_it = numbers(jsd(), logits(0) + dead, logits(1) + dead, MASK, beta)
    alive = np.array([0, 1, 3, 4, 5])
    without = numbers(jsd(), logits(0)[..., alive], logits(1)[..., alive], MASK, beta)
    np.testing.assert_allclose(with_it[0], without[0], rtol=1e-5)
    np.testing.assert_allclose(with_it[1][..., alive], without[1], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(with_it[1][..., 2], np.zeros((2, 3)))


def test_one_bucket_for_a_single_token_is_the_whole_kl():
    teacher = logits(1)
    found = numbers(of_top(losses.distill_top_k, 5), logits(0), teacher, MASK)
    expected = numbers(losses.distill_forward_kl, logits(0), teacher, MASK)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("loss", TOP_K)
def test_the_whole_vocabulary_leaves_an_empty_bucket(loss):
    teacher = logits(1)
    found, slope = numbers(of_top(loss, 6), logits(0), teacher, MASK)
    expected, expected_slope = numbers(losses.distill_forward_kl, logits(0), teacher, MASK)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_a_bucket_loses_no_more_than_it_hides(scale):
    """Merging categories can only lower a KL."""
    student, teacher = scale * logits(0), scale * logits(1)
    whole = value(losses.distill_forward_kl, student, teacher, MASK)
    for k in (1, 3, 5):
        total, slope = numbers(of_top(losses.distill_top_k, k), student, teacher, MASK)
        now = value(of_top(losses.distill_top_k, k), student, teacher, MASK)
        assert np.isfinite(total) and np.all(np.isfinite(slope))
        assert np.all(now <= whole * (1 + 1e-5) + 1e-4) and np.all(now >= -1e-4)


def test_a_small_tail_keeps_its_digits():
    """1 - sum(p) would say 0, or a multiple of 6e-8."""
    student, half = np.float32([[[0.0, -13.0, -14.0]]]), np.log(np.float32([[[0.5]]]))
    found = value(losses.distill_top_k, student, half, np.array([[[0]]]), np.ones((1, 1), np.float32))
    tail = np.exp(-13.0) + np.exp(-14.0)
    np.testing.assert_allclose(found, -np.log(2) + 0.5 * np.log1p(tail) * 2 - 0.5 * np.log(tail), rtol=1e-6)


@pytest.mark.parametrize("loss", TOP_K)
def test_top_k_of_the_teacher_is_a_constant_and_impossible_tokens_add_nothing(loss):
    impossible = logits(1)
    impossible[..., :4] = -np.inf
    found, tokens = jax.tree.map(np.asarray, jax.jit(partial(top_k, k=3))(impossible))
    assert np.isneginf(found).any()

    def total(x, found):
        return jnp.sum(loss(x, found, jnp.asarray(tokens), jnp.asarray(MASK)))

    summed, (student, teacher) = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(logits(0), found)
    assert np.all(np.isfinite(student)) and np.isfinite(summed)
    np.testing.assert_array_equal(teacher, np.zeros(teacher.shape))


@pytest.mark.parametrize("loss", DENSE)
def test_other_vocabularies_are_refused_by_name(loss):
    with pytest.raises(ValueError, match=rf"{loss.__name__}: .*expected one vocabulary, not 6 tokens and 5"):
        jax.eval_shape(loss, logits(0), logits(1)[..., 1:], MASK)


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"beta": 1.5}, {"temperature": 0.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"generalised_jsd: {next(iter(wrong))}=.*expected"):
        losses.generalised_jsd(*map(jnp.asarray, (logits(0), logits(1), MASK)), **wrong)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        **{
            f.__name__: Row(f, tokenwise(f, *LOGITS), getattr(references, f.__name__), LOGITS)
            for f in (losses.distill_forward_kl, losses.distill_reverse_kl)
        },
        "generalised_jsd": Row(
            losses.generalised_jsd,
            tokenwise(losses.generalised_jsd, *LOGITS),
            references.generalised_jsd,
            LOGITS,
            {"beta": 0.3, "temperature": 1.5},
        ),
        "generalised_jsd_at_0": Row(
            losses.generalised_jsd,
            tokenwise(losses.generalised_jsd, *LOGITS),
            references.generalised_jsd,
            LOGITS,
            {"beta": 0.0},
        ),
    }


class TestTopK(Properties):
    rows = {  # noqa: RUF012
        f.__name__: Row(
            f,
            tokenwise(f, "logits", "teacher_logp", "teacher_ids"),
            getattr(references, f.__name__),
            {
                "logits": STUDENT,
                "teacher_logp": Input("B T K", make=top_logp),
                "teacher_ids": Input("B T K", make=ids),
            },
            rtol=5e-6,
        )
        for f in TOP_K
    }

    def test_bad_shapes_are_refused(self, row):
        """Fewer logits than there are ids; one more or less is another vocabulary, which cannot be seen."""
        x = make(row)
        for bad in (x["logits"][..., :3], x["logits"][:, :-1], x["logits"][0]):
            with pytest.raises(Exception, match=r"rank|shape|type"):
                jax.eval_shape(row.call, {**x, "logits": bad})
        for name in ("teacher_logp", "teacher_ids", "mask"):
            with pytest.raises(Exception, match=r"rank|shape|type"):
                jax.eval_shape(row.call, {**x, name: x[name][..., :-1]})
