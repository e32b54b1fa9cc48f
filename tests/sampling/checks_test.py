"""Bad input is refused with what was received and what was expected, while tracing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import toys

from alignax.sampling import Settings, checks, generate

PROMPTS = np.zeros((2, 3), np.int32)


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, r"max_new_tokens=0; expected at least 1", {"max_new_tokens": 0}),
        (TypeError, r"max_new_tokens=2\.0 \(float\); expected a static int", {"max_new_tokens": 2.0}),
        (ValueError, r"group=0; expected at least 1", {"group": 0}),
        (TypeError, r"group=True \(bool\); expected a static int", {"group": True}),
    ],
)
def test_refuses_what_is_static(error, message, keywords):
    checks.static(**(good := {"max_new_tokens": 4, "group": 2}))
    with pytest.raises(error, match=message):
        checks.static(**{**good, **keywords})


@pytest.mark.parametrize(
    ("error", "message", "value"),
    [
        (TypeError, r"eos_ids=2; expected ints, such as \(2,\)", 2),
        (TypeError, r"eos_ids=\('2',\); expected ints", ("2",)),
        (TypeError, r"eos_ids='12'; expected ints", "12"),
        (TypeError, r"eos_ids=\(2\.0,\); expected ints", (2.0,)),
        (TypeError, r"eos_ids of dtype float32; expected integers", np.ones(2, np.float32)),
        (ValueError, r"eos_ids=\[ 2 -1\]; expected ids of at least 0", (2, -1)),
        (ValueError, r"eos_ids=\[-2\]; expected ids of at least -1", np.array([-2])),
        (ValueError, r"eos_ids=\(2, 2147483648\); expected ids of at most 2147483647", (2, 2**31)),
        (ValueError, r"eos_ids=\(1180591620717411303424,\); expected ids of at most 2147483647", (2**70,)),
        (ValueError, r"eos_ids=\[4294967298\]; expected ids of at most 2147483647", np.array([2**32 + 2])),
        (ValueError, r"eos_ids of shape \(3, 1\); expected \[N\] or \[2, N\]", np.ones((3, 1), int)),
        (ValueError, r"eos_ids of shape \(1, 2, 1\); expected \[N\] or \[2, N\]", np.ones((1, 2, 1), int)),
    ],
)
def test_refuses_ids(error, message, value):
    with pytest.raises(error, match=message):
        checks.ids(2, "eos_ids", value)


def test_ids_are_spread_over_the_rows():
    assert checks.ids(2, "eos_ids", ()).shape == (2, 0)
    assert checks.ids(2, "eos_ids", (3, 4)).tolist() == [[3, 4], [3, 4]]
    assert checks.ids(2, "eos_ids", np.array([[3, -1], [4, 5]])).tolist() == [[3, -1], [4, 5]]


@pytest.mark.parametrize(
    ("error", "message", "value"),
    [
        (TypeError, r"stop=\(1, 2\); expected sequences of ids", (1, 2)),
        (TypeError, r"stop=\(\(\),\); expected sequences of ids, none of them empty", ((),)),
        (TypeError, r"stop=\('ab',\); expected sequences of ids", ("ab",)),
        (ValueError, r"stop=\(\(1, -1\),\); expected ids of at least 0", ((1, -1),)),
        (ValueError, r"stop=.*4294967298.*; expected ids of at most 2147483647", ((1, 2**32 + 2),)),
        (ValueError, r"stop=.*4294967298.*; expected ids of at most 2147483647", np.array([[2**32 + 2]])),
        (ValueError, r"stop of shape \(2, 0\); expected sequences of at least one id", np.zeros((2, 0), int)),
        (ValueError, r"stop has -1 behind an id", np.array([[1, -1]])),
        (ValueError, r"stop of shape \(3, 1, 1\); expected \[K, L\] or \[2, K, L\]", np.ones((3, 1, 1), int)),
    ],
)
def test_refuses_stop_sequences(error, message, value):
    with pytest.raises(error, match=message):
        checks.sequences(2, value)


def test_stop_sequences_are_padded_in_front():
    assert checks.sequences(1, ((5, 6), (7,))).tolist() == [[[5, 6], [-1, 7]]]
    assert checks.sequences(2, ()).shape == (2, 0, 1)
    assert checks.sequences(2, np.array([[[1]], [[2]]])).tolist() == [[[1]], [[2]]]


@pytest.mark.parametrize(
    ("error", "message", "prompts", "lengths", "row_ids"),
    [
        (ValueError, r"lengths\[1\]=0, expected 1 to 3.*empty prompt", PROMPTS, [3, 0], None),
        (ValueError, r"lengths\[0\]=4, expected 1 to 3.*not fit", PROMPTS, [4, 1], None),
        (ValueError, r"lengths of shape \(1,\) for 2 prompts; expected \(2,\)", PROMPTS, [3], None),
        (TypeError, r"lengths of dtype float32; expected integers", PROMPTS, [3.0, 1.0], None),
        (TypeError, r"prompts of dtype float32; expected integers", PROMPTS.astype(np.float32), [3, 2], None),
        (ValueError, r"prompts of shape \(2, 0\); expected \[B, P\]", PROMPTS[:, :0], [3, 2], None),
        (ValueError, r"prompts of shape \(3,\); expected \[B, P\]", PROMPTS[0], [3, 2], None),
        (ValueError, r"row_ids of shape \(2,\) for 2 prompts in groups of 3; expected \(6,\)", PROMPTS, [3, 2], [0, 1]),
        (TypeError, r"row_ids of dtype float32; expected integers", PROMPTS, [3, 2], [0.0] * 6),
    ],
)
def test_refuses_prompts(error, message, prompts, lengths, row_ids):
    checks.prompts(jnp.asarray(PROMPTS), jnp.array([3, 1]), jnp.arange(6), group=3)
    row_ids = None if row_ids is None else jnp.array(row_ids)
    with pytest.raises(error, match=message):
        checks.prompts(jnp.asarray(prompts), jnp.array(lengths), row_ids, group=3)


@pytest.mark.parametrize(
    ("error", "message", "settings"),
    [
        (ValueError, r"temperature=-0\.5; expected values in \[0, infinity\)", {"temperature": -0.5}),
        (ValueError, r"temperature=nan", {"temperature": float("nan")}),
        (ValueError, r"temperature=inf", {"temperature": float("inf")}),
        (ValueError, r"temperature of shape \(3,\); expected one number or \(2,\)", {"temperature": jnp.ones(3)}),
        (ValueError, r"top_k=-1; expected values in \[0, 2147483647\], int32", {"top_k": -1}),
        (ValueError, r"top_k=2147483648; expected values in \[0, 2147483647\]", {"top_k": 2**31}),
        (ValueError, r"temperature=1e\+39; expected values in \[0, infinity\), float32", {"temperature": 1e39}),
        (ValueError, r"repetition_penalty=1e-50; expected .* \(0, infinity\), float32", {"repetition_penalty": 1e-50}),
        (TypeError, r"top_k of dtype float32; expected integers", {"top_k": 2.5}),
        (ValueError, r"top_p=0\.0; expected values in \(0, 1\]", {"top_p": 0.0}),
        (ValueError, r"top_p=1\.5; expected values in \(0, 1\]", {"top_p": 1.5}),
        (ValueError, r"min_p=.*; expected values in \[0, 1\]", {"min_p": jnp.array([0.0, 2.0])}),
        (ValueError, r"repetition_penalty=0; expected values in \(0, infinity\)", {"repetition_penalty": 0}),
        (ValueError, r"max_tokens=0; expected values in \[1, 2147483647\], int32", {"max_tokens": 0}),
        (ValueError, r"max_tokens=.*5.*; expected at most max_new_tokens=4", {"max_tokens": 5}),
    ],
)
def test_refuses_numbers(error, message, settings):
    with pytest.raises(error, match=message):
        Settings.make(2, max_new_tokens=4, **settings)


def test_numbers_are_spread_over_the_rows():
    found = Settings.make(2, max_new_tokens=4, top_k=jnp.array([0, 3]), min_p=jnp.array(0.5))
    assert [x.tolist() for x in found[:6]] == [[1.0] * 2, [0, 3], [1.0] * 2, [0.5] * 2, [1.0] * 2, [4, 4]]
    assert [str(x.dtype) for x in found[:6]] == ["float32", "int32", "float32", "float32", "float32", "int32"]


@pytest.mark.parametrize("row_id", [2**32 + 7, 2**31, -(2**31) - 1])
def test_refuses_row_ids_that_would_wrap(row_id):
    prompts, lengths = jnp.asarray(PROMPTS), jnp.array([3, 1])
    checks.prompts(prompts, lengths, np.array([-(2**31), 2**31 - 1]), group=1)
    with pytest.raises(ValueError, match=rf"row_ids\[1\]={row_id}; expected an int32"):
        checks.prompts(prompts, lengths, np.array([7, row_id]), group=1)


def test_refuses_while_tracing_and_leaves_traced_values_alone():
    sample = functools.partial(generate, toys.chain(), max_new_tokens=2)
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((5, 5), jnp.float32), ((2, 3), jnp.int32), ((2,), jnp.int32))]
    key = jax.random.key(0)
    out = jax.eval_shape(lambda *args: sample(*args, key, temperature=args[0][0, 0], top_p=args[0][0, 1]), *shapes)
    assert out.tokens.shape == (2, 5)
    with pytest.raises(ValueError, match=r"top_p=0\.0"):
        jax.eval_shape(lambda *args: sample(*args, key, top_p=0.0), *shapes)
    with pytest.raises(ValueError, match=r"lengths\[0\]=0"):
        sample(jnp.zeros((5, 5)), jnp.asarray(PROMPTS), jnp.array([0, 1]), key)
    with pytest.raises(ValueError, match=r"max_new_tokens=0"):
        generate(toys.chain(), jnp.zeros((5, 5)), jnp.asarray(PROMPTS), jnp.array([1, 1]), key, max_new_tokens=0)
    with pytest.raises(ValueError, match=r"row_ids of shape"):
        sample(jnp.zeros((5, 5)), jnp.asarray(PROMPTS), jnp.array([1, 1]), key, row_ids=jnp.arange(3))
