"""Every loss times every property. A new loss is one row of LOSSES and one loop in tests/references/losses.py."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import losses as references

from alignax import losses
from alignax.types import Response

ROWS, LENGTH = 4, 6


def pairwise(loss):
    """A pairwise loss as a function of a dict of arrays."""

    def call(x, **hyper):
        chosen, rejected = (
            Response(x[f"{side}_logp"], x[f"{side}_ref_logp"], x[f"{side}_mask"]) for side in ("chosen", "rejected")
        )
        return loss(chosen, rejected, **hyper)

    return call


def tokenwise(loss, *names):
    """A loss over tokens as a function of a dict of arrays."""
    return lambda x, **hyper: loss(*(x[name] for name in names), x["mask"], **hyper)


def scorewise(loss, *keywords):
    """A loss over pairs of scores as a function of a dict of arrays, of which some go in by keyword."""
    return lambda x, **hyper: loss(x["chosen"], x["rejected"], **{name: x[name] for name in keywords}, **hyper)


def full_kl(x):
    """The exact KL over a vocabulary of three, of which the logit of one is free."""
    p, q = (jnp.stack([x[name], jnp.zeros_like(x[name]), jnp.full_like(x[name], 0.5)], -1) for name in LOGITS)
    return losses.full_kl(p, q, x["mask"])


class Row(NamedTuple):
    call: Callable
    reference: Callable
    arrays: tuple[str, ...]  # "mask" arrays are made beside them
    hyper: dict  # values other than the defaults, swept under one compilation
    differentiable: tuple[str, ...] = ("logp",)
    tokens: bool = True  # arrays are [B, T] under a mask; else [B]
    gradient_of: Callable | None = None  # the reference whose gradient is wanted, where it is another one


PAIR = ("chosen_logp", "chosen_ref_logp", "rejected_logp", "rejected_ref_logp")
PAIR_GRAD = ("chosen_logp", "rejected_logp")
KL = ("logp", "ref_logp")
POLICY = ("logp", "old_logp", "advantages")
VALUE = ("values", "old_values", "returns")
LOGITS = ("logits", "ref_logits")
SCORES = ("chosen", "rejected")
LOSSES = {
    "cross_entropy": Row(tokenwise(losses.cross_entropy, "logp"), references.cross_entropy, ("logp",), {}),
    "dpo": Row(pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.5}, differentiable=PAIR_GRAD),
    "cdpo": Row(
        pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.2, "label_smoothing": 0.3}, differentiable=PAIR_GRAD
    ),
    "ipo": Row(pairwise(losses.ipo), references.ipo, PAIR, {"beta": 0.3}, differentiable=PAIR_GRAD),
    "ipo_average": Row(
        pairwise(losses.ipo_average), references.ipo_average, PAIR, {"beta": 0.3}, differentiable=PAIR_GRAD
    ),
    "k1": Row(tokenwise(losses.k1, *KL), references.k1, KL, {}),
    "k2": Row(tokenwise(losses.k2, *KL), references.k2, KL, {}),
    "k3": Row(tokenwise(losses.k3, *KL), references.k3, KL, {}),
    "k3_straight_through": Row(
        tokenwise(losses.k3_straight_through, *KL), references.k3, KL, {}, gradient_of=references.k2
    ),
    "k3_forward": Row(tokenwise(losses.k3_forward, *KL), references.k3_forward, KL, {}),
    "absolute": Row(tokenwise(losses.absolute, *KL), references.absolute, KL, {}),
    "full_kl": Row(full_kl, references.full_kl, LOGITS, {}, differentiable=LOGITS),
    "ppo_clip": Row(tokenwise(losses.ppo_clip, *POLICY), references.ppo_clip, POLICY, {"clip_low": 0.1}),
    "ppo_clip_higher": Row(
        tokenwise(losses.ppo_clip, *POLICY), references.ppo_clip, POLICY, {"clip_low": 0.15, "clip_high": 0.28}
    ),
    "ppo_dual_clip": Row(tokenwise(losses.ppo_clip, *POLICY), references.ppo_clip, POLICY, {"dual_clip": 1.5}),
    "ppo_penalty": Row(tokenwise(losses.ppo_penalty, *POLICY), references.ppo_penalty, POLICY, {"kl_weight": 0.3}),
    "value_clip": Row(
        tokenwise(losses.value_clip, *VALUE), references.value_clip, VALUE, {"clip": 0.5}, differentiable=("values",)
    ),
    "bradley_terry": Row(
        scorewise(losses.bradley_terry),
        references.bradley_terry,
        SCORES,
        {"margin": 0.5, "preference": 0.8},
        differentiable=SCORES,
        tokens=False,
    ),
    "bradley_terry_arrays": Row(
        scorewise(losses.bradley_terry, "margin", "preference"),
        references.bradley_terry,
        (*SCORES, "margin", "preference"),
        {},
        differentiable=(*SCORES, "margin", "preference"),
        tokens=False,
    ),
    "reward_centering": Row(
        scorewise(losses.reward_centering),
        references.reward_centering,
        SCORES,
        {},
        differentiable=SCORES,
        tokens=False,
    ),
}
each = pytest.mark.parametrize("row", LOSSES.values(), ids=LOSSES.keys())
TOKENS = {name: row for name, row in LOSSES.items() if row.tokens}
each_over_tokens = pytest.mark.parametrize("row", TOKENS.values(), ids=TOKENS.keys())


def make(row: Row, seed=0, scale=1.0, rows=ROWS, length=LENGTH):
    """Random inputs; the second row's masks are empty and masks have holes."""
    rng = np.random.default_rng(seed)
    shape = (rows, length) if row.tokens else (rows,)
    x = {name: (scale * rng.normal(size=shape) - 2).astype(np.float32) for name in row.arrays}
    for name in ("mask", "chosen_mask", "rejected_mask") if row.tokens else ():
        mask = rng.random((rows, length)) < 0.6
        mask[1] = False
        x[name] = mask
    if "advantages" in x:
        x["advantages"] += 2
    return x


def device(x):
    return jax.tree.map(jnp.asarray, x)


@each
def test_equals_the_loop(row):
    for hyper in ({}, row.hyper):
        x = make(row)
        np.testing.assert_allclose(row.call(device(x), **hyper), row.reference(x, **hyper), rtol=2e-6, atol=2e-6)


@each
def test_jit_equals_eager_and_compiles_once_for_all_hyperparameters(row):
    traces = []

    @jax.jit
    def call(x, hyper):
        traces.append(1)
        return row.call(x, **hyper)

    x = device(make(row))
    for factor in (1.0, 1.1, 0.9):
        hyper = {name: value * factor for name, value in row.hyper.items()}
        np.testing.assert_allclose(call(x, hyper), row.call(x, **hyper), rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


@each
def test_gradient_equals_finite_differences_of_the_loop(row):
    x = make(row, seed=1)
    x64 = {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in x.items()}
    grads = jax.grad(lambda x: jnp.sum(row.call(x, **row.hyper)), allow_int=True)(device(x))
    step = 1e-5
    reference = row.gradient_of or row.reference
    for name in row.arrays:
        expected = np.zeros(x[name].shape)
        for index in np.ndindex(x[name].shape) if name in row.differentiable else ():
            up, down = ({**x64, name: x64[name].copy()} for _ in range(2))
            up[name][index] += step
            down[name][index] -= step
            difference = reference(up, **row.hyper).sum() - reference(down, **row.hyper).sum()
            expected[index] = difference / (2 * step)
        np.testing.assert_allclose(grads[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@each_over_tokens
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
def test_masked_entries_reach_neither_value_nor_gradient(row, garbage):
    x = make(row)
    dirty = dict(x)
    for name in row.arrays:
        side = name.split("_")[0]
        mask = x[f"{side}_mask"] if side in ("chosen", "rejected") else x["mask"]
        dirty[name] = np.where(mask, x[name], np.float32(garbage))
    value_and_grad = jax.value_and_grad(lambda x: jnp.sum(row.call(x, **row.hyper)), allow_int=True)
    clean_value, clean_grad = value_and_grad(device(x))
    value, grad = value_and_grad(device(dirty))
    np.testing.assert_array_equal(value, clean_value)
    for name in row.differentiable:
        np.testing.assert_array_equal(grad[name], clean_grad[name])


@each_over_tokens
def test_padding(row):
    x = make(row)
    expected = np.asarray(row.call(device(x), **row.hyper))
    longer = {name: np.pad(value, ((0, 0), (0, 3))) for name, value in x.items()}
    padded = np.asarray(row.call(device(longer), **row.hyper))
    np.testing.assert_array_equal(padded if padded.ndim == 1 else padded[:, :LENGTH], expected)


@each
def test_permutation(row):
    x = make(row)
    expected = np.asarray(row.call(device(x), **row.hyper))
    order = np.array([2, 0, 3, 1])
    permuted = row.call(device({name: value[order] for name, value in x.items()}), **row.hyper)
    np.testing.assert_array_equal(permuted, expected[order])


@each
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_finite_at_extremes(row, scale):
    x = device(make(row, scale=scale))
    value, grad = jax.value_and_grad(lambda x: jnp.sum(row.call(x, **row.hyper)), allow_int=True)(x)
    assert jnp.isfinite(value)
    for name in row.differentiable:
        assert jnp.all(jnp.isfinite(grad[name])), name


@each_over_tokens
def test_a_token_of_probability_zero_gives_no_nan(row):
    x = device(make(row))
    for name in row.differentiable:
        x[name] = x[name].at[0].set(-jnp.inf)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(row.call(x, **row.hyper)), allow_int=True)(x)
    assert not jnp.isnan(value)
    for name in row.differentiable:
        assert not jnp.any(jnp.isnan(grad[name])), name


@each
def test_bfloat16_in_float32_out(row):
    x = device(make(row))
    half = {name: value.astype(jnp.bfloat16) if value.dtype == jnp.float32 else value for name, value in x.items()}
    rounded = {
        name: value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value for name, value in half.items()
    }
    out = row.call(half)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, row.call(rounded))


@each
def test_bad_shapes_are_refused(row):
    x = device(make(row))
    short = {**x, row.arrays[0]: x[row.arrays[0]][..., :-1]}
    with pytest.raises(Exception, match=r"shape|Shape|type"):
        row.call(short)
    flat = {**x, row.arrays[0]: x[row.arrays[0]][0]}
    with pytest.raises(Exception, match=r"rank|shape|type"):
        row.call(flat)
