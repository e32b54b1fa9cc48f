"""What every objective must do, whatever it computes: a function is one `Row`, and inherits every test of `Properties`.

    class TestRows(Properties):
        rows = {"dpo": Row(losses.dpo, pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.5}), ...}

The value expected is that of a loop over numbers in float64 (`tests/references`), written from the formula; the
gradient that of its finite differences.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.types import Response

SIZES = {"B": 4, "T": 6, "K": 4, "V": 5}


def logp(rng, shape, scale):
    """Log-probabilities, or any number about as large; `scale` makes them extreme."""
    return (scale * rng.normal(size=shape) - 2).astype(np.float32)


def real(rng, shape, scale):
    """Numbers on both sides of 0."""
    return (scale * rng.normal(size=shape)).astype(np.float32)


def probability(rng, shape, scale):
    """In (0.05, 0.95), whatever the scale."""
    return rng.uniform(0.05, 0.95, shape).astype(np.float32)


def boolean(rng, shape, scale):
    """True or False, with both in the first two rows."""
    return (rng.random(shape) < 0.5) ^ (np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) == 0)


def ranks(rng, shape, scale):
    """A permutation of 1..K in every row, 1 the best."""
    return np.argsort(rng.random(shape), axis=-1).astype(np.int32) + 1


class Input(NamedTuple):
    """One array of a row: its axes, the mask it stands under, whether it has a gradient, how it is made."""

    axes: str = "B T"
    mask: str | None = "mask"
    differentiable: bool = False
    make: Callable = logp


class Row(NamedTuple):
    """One function with all that is needed to hold it to the properties."""

    function: Callable  # the public function, by which the pages of the library find its tests
    call: Callable  # (dict of arrays, **hyper) -> array
    reference: Callable  # the same in numpy: a loop, float64
    inputs: dict[str, Input]  # masks are made beside them
    hyper: dict = {}  # noqa: RUF012  values other than the defaults, swept under one compilation
    gradient_of: Callable | None = None  # the reference whose gradient is wanted, where it is another one
    coupled: bool = False  # rows know of each other (a sort over the batch); their order still changes nothing else
    rtol: float = 2e-6


LOGP = Input(differentiable=True)
CONSTANT = Input()
PAIR = {
    f"{side}_{name}": Input(mask=f"{side}_mask", differentiable=name == "logp")
    for side in ("chosen", "rejected")
    for name in ("logp", "ref_logp")
}


def pairwise(loss: Callable, *extra: str) -> Callable:
    """A loss of two `Response`s as a function of a dict; extra: names of `Response.extra`, read from SIDE_NAME."""

    def side(x, name):
        arrays = {e: x[f"{name}_{e}"] for e in extra if f"{name}_{e}" in x}
        return Response(x[f"{name}_logp"], x.get(f"{name}_ref_logp"), x[f"{name}_mask"], arrays)

    return lambda x, **hyper: loss(side(x, "chosen"), side(x, "rejected"), **hyper)


def unpaired(loss: Callable, *arrays: str) -> Callable:
    """A loss of one `Response` and more arrays, by position."""
    return lambda x, **hyper: loss(
        Response(x["logp"], x["ref_logp"], x["mask"]), *(x[name] for name in arrays), **hyper
    )


def tokenwise(loss: Callable, *arrays: str) -> Callable:
    """A loss over tokens: the arrays by position, then the mask."""
    return lambda x, **hyper: loss(*(x[name] for name in arrays), x["mask"], **hyper)


def by_position(loss: Callable, *arrays: str, **keywords: str) -> Callable:
    """A function of arrays by position, and of some by keyword (argument=name of the array)."""
    return lambda x, **hyper: loss(
        *(x[name] for name in arrays), **{argument: x[name] for argument, name in keywords.items()}, **hyper
    )


def make(row: Row, seed: int = 0, scale: float = 1.0, **sizes: int) -> dict[str, np.ndarray]:
    """Random inputs; masks have holes, and that of the second row is empty."""
    rng, sizes = np.random.default_rng(seed), SIZES | sizes
    x = {name: i.make(rng, tuple(sizes[a] for a in i.axes.split()), scale) for name, i in row.inputs.items()}
    for name in sorted({i.mask for i in row.inputs.values() if i.mask}):
        x[name] = rng.random((sizes["B"], sizes["T"])) < 0.6
        x[name][1] = False
    return x


def device(x):
    """The arrays as jax has them."""
    return jax.tree.map(jnp.asarray, x)


@functools.cache  # one compilation for all tests of a row that keep its shapes
def compiled(call: Callable):
    """Jitted `(x, hyper) -> value, gradient of its sum by every floating-point input`, and the list of its traces."""
    traces = []

    @jax.jit
    def value_and_gradient(x, hyper):
        traces.append(1)
        moving = {name: value for name, value in x.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        value, pull = jax.vjp(lambda moving: call(x | moving, **hyper), moving)
        return value, pull(jnp.ones_like(value))[0]

    return value_and_gradient, traces


def of_rows(which: Callable[[Row], bool]) -> Callable:
    """Leaves a test of `Properties` out for rows of which it would say nothing: conftest deselects it."""

    def mark(test: Callable) -> Callable:
        test.of_rows = which
        return test

    return mark


class Properties:
    """The tests; a subclass names its `rows`."""

    rows: dict[str, Row]

    @pytest.fixture
    def run(self, row):
        """`row.call` with `row.hyper`, compiled: x -> value, gradients."""
        function, _ = compiled(row.call)
        return lambda x, hyper=row.hyper: jax.tree.map(np.asarray, function(device(x), hyper))

    def test_equals_the_loop(self, row, run):
        x = make(row)
        np.testing.assert_allclose(row.call(device(x)), row.reference(x), rtol=row.rtol, atol=2e-6)
        np.testing.assert_allclose(run(x)[0], row.reference(x, **row.hyper), rtol=row.rtol, atol=2e-6)

    def test_jit_equals_eager_and_compiles_once_for_all_hyperparameters(self, row):
        function, traces = compiled(row.call)
        x = device(make(row))
        function(x, row.hyper)
        seen = len(traces)
        for factor in (1.1, 0.9):
            hyper = {name: value * factor for name, value in row.hyper.items()}
            np.testing.assert_allclose(function(x, hyper)[0], row.call(x, **hyper), rtol=row.rtol, atol=2e-6)
        assert len(traces) == seen

    def test_gradient_equals_finite_differences_of_the_loop(self, row, run):
        x = make(row, seed=1)
        x64 = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in x.items()}
        reference, step = row.gradient_of or row.reference, 1e-5
        for name, gradient in run(x)[1].items():
            expected = np.zeros(x[name].shape)
            for index in np.ndindex(x[name].shape) if row.inputs[name].differentiable else ():
                up, down = ({**x64, name: x64[name].copy()} for _ in range(2))
                up[name][index] += step
                down[name][index] -= step
                difference = np.sum(reference(up, **row.hyper)) - np.sum(reference(down, **row.hyper))
                expected[index] = difference / (2 * step)
            scale = max(1.0, np.max(np.abs(expected), initial=0.0))
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * scale, err_msg=name)

    @of_rows(lambda row: any(i.mask for i in row.inputs.values()))
    def test_masked_entries_reach_neither_value_nor_gradient(self, row, run):
        x = make(row)
        clean = run(x)
        for garbage in (np.nan, np.inf, -np.inf):
            dirty = dict(x)
            for name, i in row.inputs.items():
                if i.mask and x[name].dtype == np.float32:
                    chosen = x[i.mask].reshape(*x[i.mask].shape, *[1] * (x[name].ndim - 2))
                    dirty[name] = np.where(chosen, x[name], np.float32(garbage))
            jax.tree.map(partial(np.testing.assert_array_equal, err_msg=str(garbage)), run(dirty), clean)

    @of_rows(lambda row: any(i.mask for i in row.inputs.values()))  # those that have tokens
    def test_padding(self, row, run):
        x, length = make(row), SIZES["T"]

        def longer(name, value):
            at = row.inputs[name].axes.split().index("T") if name in row.inputs and "T" in row.inputs[name].axes else -1
            at = 1 if name not in row.inputs else at
            return value if at < 0 else np.pad(value, [(0, 3 * (axis == at)) for axis in range(value.ndim)])

        (value, gradients), (padded, longer_gradients) = run(x), run({name: longer(name, v) for name, v in x.items()})
        # to an ulp: how a compiler fuses a sum of products depends on their number
        np.testing.assert_allclose(padded[:, :length] if padded.ndim > 1 else padded, value, rtol=1e-6, atol=1e-7)
        for name, gradient in gradients.items():
            same = longer_gradients[name][:, : gradient.shape[1]] if gradient.ndim > 1 else longer_gradients[name]
            np.testing.assert_allclose(same, gradient, rtol=1e-6, atol=1e-7)

    def test_permutation(self, row, run):
        x, order = make(row), np.array([2, 0, 3, 1])
        value, gradients = run(x)
        permuted, permuted_gradients = run({name: array[order] for name, array in x.items()})
        if row.coupled:  # sums over rows round differently in another order; a statistic of all has no rows
            expected = value[order] if len(value) == len(order) else value
            np.testing.assert_allclose(permuted, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(permuted, value[order])
        for name, gradient in gradients.items():
            np.testing.assert_allclose(permuted_gradients[name], gradient[order], rtol=1e-6, atol=1e-7)

    @of_rows(lambda row: not row.coupled)
    def test_a_row_knows_of_no_other(self, row, run):
        """So that micro-batches add up: whatever is coupled comes in as an argument."""
        x, others = make(row), make(row, seed=2)
        mixed = {name: np.concatenate([x[name][:2], others[name][2:]]) for name in x}
        np.testing.assert_array_equal(run(mixed)[0][:2], run(x)[0][:2])

    def test_finite_at_extremes(self, row, run):
        for scale in (50.0, 1e4):
            value, gradients = run(make(row, scale=scale))
            assert np.all(np.isfinite(value)), scale
            for name, gradient in gradients.items():
                assert np.all(np.isfinite(gradient)), (name, scale)

    @of_rows(lambda row: any(i.differentiable and i.make is logp for i in row.inputs.values()))
    def test_a_token_of_probability_zero_gives_no_nan(self, row, run):
        x = make(row)
        for name, i in row.inputs.items():
            if i.differentiable and i.make is logp:
                x[name][0] = -np.inf
        value, gradients = run(x)
        assert not np.any(np.isnan(value))
        for name, gradient in gradients.items():
            assert not np.any(np.isnan(gradient)), name

    def test_bfloat16_in_float32_out(self, row):
        half = {n: v.astype(jnp.bfloat16) if v.dtype == np.float32 else v for n, v in make(row).items()}
        rounded = {n: v.astype(np.float32) if v.dtype == jnp.bfloat16 else v for n, v in half.items()}
        out = row.call(device(half))
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, row.call(device(rounded)))

    def test_bad_shapes_are_refused(self, row):
        x = make(row)
        last = [i.axes.split()[-1] for i in row.inputs.values()] + ["T" for i in row.inputs.values() if i.mask]
        for name, i in row.inputs.items():
            known = last.count(i.axes.split()[-1]) > 1  # a size that nothing else has may be any
            # a number may stand for [B]
            for bad in ([x[name][..., :-1]] if known else []) + ([x[name][0]] if x[name].ndim > 1 else []):
                with pytest.raises(Exception, match=r"rank|shape|Shape|type"):
                    jax.eval_shape(row.call, {**x, name: bad})
                    pytest.fail(f"{name} of shape {bad.shape} was accepted")  # no Exception, so it gets through
