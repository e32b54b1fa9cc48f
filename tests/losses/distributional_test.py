"""What is particular to losses of quantiles: the sort, rows left out of it, the mark that keeps the batch whole."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row
from references import distributional as references

from alignax import losses, reduce
from alignax.losses.extras import needs_whole_batch
from alignax.types import Response

BOTH = pytest.mark.parametrize("loss", [losses.aot, losses.aot_unpaired], ids=["aot", "aot_unpaired"])
NUMBERS = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32) * 5


def sides(numbers):
    """Pairs of answers of one token: rows are chosen and its reference's, rejected and its."""
    columns, ones = numbers[..., None], jnp.asarray(np.ones((*numbers.shape[1:], 1), bool))
    return Response(columns[0], columns[1], ones), Response(columns[2], columns[3], ones)


def test_the_batch_has_to_be_whole():
    for loss in (losses.aot, losses.aot_unpaired):
        assert needs_whole_batch(loss)
        assert needs_whole_batch(functools.partial(loss, beta=0.1))
    assert not needs_whole_batch(losses.dpo)


@BOTH
def test_rows_that_weigh_nothing_are_in_neither_sort(loss):
    """The rest has the loss and the gradient that it has alone, wherever the fillers stand and whatever they hold."""
    filled = np.insert(NUMBERS, [0, 3, 7], np.array([np.nan, 1e4, -1e4]), axis=1)
    weights = np.insert(np.full(7, 0.5, np.float32), [0, 3, 7], 0.0)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(numbers, weights):
        per_row = loss(*sides(numbers), beta=0.3, label_smoothing=0.1, weights=weights)
        return reduce.batch_mean(per_row, weights).value(), per_row

    kept = np.flatnonzero(weights)
    (alone, rows_alone), gradient_alone = jax.tree.map(np.asarray, run(NUMBERS, None))
    (mean, rows), gradient = jax.tree.map(np.asarray, run(filled, weights))
    np.testing.assert_allclose(mean, alone, rtol=1e-6)
    np.testing.assert_array_equal(rows[kept], rows_alone)
    np.testing.assert_array_equal(np.delete(rows, kept), 0)
    np.testing.assert_allclose(gradient[:, kept], gradient_alone, rtol=1e-6)
    np.testing.assert_array_equal(np.delete(gradient, kept, axis=1), 0)
    assert np.any(gradient_alone != 0)


@BOTH
def test_no_row_counts(loss):
    rows, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(*sides(x), weights=jnp.zeros(7)))))(NUMBERS)
    np.testing.assert_array_equal(rows, 0)
    np.testing.assert_array_equal(gradient, 0)


def test_unpaired_answers_need_no_partner():
    """Either side in another order: each row of it keeps its gradient."""
    order = np.array([3, 0, 6, 2, 5, 1, 4])

    @jax.jit
    @jax.value_and_grad
    def total(numbers):
        return jnp.sum(losses.aot_unpaired(*sides(numbers), beta=0.3))

    value, gradient = jax.tree.map(np.asarray, total(NUMBERS))
    for moved in (slice(0, 2), slice(2, 4)):
        other, expected = NUMBERS.copy(), np.array(gradient)
        other[moved], expected[moved] = NUMBERS[moved][:, order], gradient[moved][:, order]
        again, gradient_again = total(other)
        np.testing.assert_allclose(again, value, rtol=1e-6)
        np.testing.assert_allclose(gradient_again, expected, rtol=1e-6)


def test_the_reference_needs_no_partner():
    """AOT of pairs compares margins of the policy with any rows of the reference."""
    order, moved = np.array([3, 0, 6, 2, 5, 1, 4]), NUMBERS.copy()
    moved[1::2] = NUMBERS[1::2, order]
    run = jax.jit(lambda numbers: losses.aot(*sides(numbers)))
    np.testing.assert_allclose(run(moved), run(NUMBERS), rtol=1e-6)


def test_one_row_is_dpo():
    @jax.jit
    def run(one):
        return [loss(*sides(one), beta=0.3) for loss in (losses.dpo, losses.aot, losses.aot_unpaired)]

    expected, *found = run(NUMBERS[:, :1])
    for loss in found:
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def a_few_fillers(rng, shape, scale):
    return np.where(rng.random(shape) < 0.3, 0.0, rng.uniform(0.5, 1, shape)).astype(np.float32)


WEIGHTED = {**PAIR, "weights": Input("B", mask=None, make=a_few_fillers)}


def row(name, inputs):
    loss = getattr(losses, name)

    def call(x, **hyper):
        chosen, rejected = (
            Response(x[f"{side}_logp"], x[f"{side}_ref_logp"], x[f"{side}_mask"]) for side in ("chosen", "rejected")
        )
        return loss(chosen, rejected, weights=x.get("weights"), **hyper)

    return Row(loss, call, getattr(references, name), inputs, {"beta": 0.3, "label_smoothing": 0.1}, coupled=True)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "aot": row("aot", PAIR),
        "aot_weighted": row("aot", WEIGHTED),
        "aot_unpaired": row("aot_unpaired", PAIR),
        "aot_unpaired_weighted": row("aot_unpaired", WEIGHTED),
    }
