"""Distillation against a numpy loop over whole distributions; contexts, misaligned rows, answers stored ahead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import ROWS, VOCAB, Problem, assert_same, rows, small, three_updates
from references import distillation as references

from alignax import losses, train
from alignax.algorithms import distillation

CONTEXT = np.array([3, 1, 4, 1], np.int32)


@functools.cache
def teacher():
    return jax.tree.map(lambda x: 0.9 * np.asarray(x), small()[1])


def after_context(batch):
    """The batch whose teacher reads four tokens before every row; one of them is token 0, which also pads."""
    count = len(CONTEXT)
    return batch._replace(
        teacher_tokens=np.concatenate([np.tile(CONTEXT, (len(batch.tokens), 1)), batch.tokens], axis=1),
        teacher_segments=np.pad(batch.segments, ((0, 0), (count, 0)), constant_values=1),
        teacher_mask=np.pad(batch.mask, ((0, 0), (count, 0))),
    )


PLAIN = distillation.Batch(**rows(ROWS))
WITH_CONTEXT = after_context(PLAIN)


@functools.cache
def compiled(loss, make_loss):
    @jax.jit
    def run(params, batch, frozen, hyper):
        def of(params, frozen):
            terms, metrics = make_loss(small()[0], loss=loss)(params, batch, frozen, hyper)
            ((name, term),) = terms.items()
            assert name == "distillation"
            return term.mean.value(), (term.mean.count, train.merge([metrics]))

        return jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(params, frozen)

    return run


def total(batch, params, frozen, hyper, loss=losses.distill_forward_kl, make_loss=distillation.make_loss):
    """Value, gradients by the student's and the frozen parameters, metrics and the count; compiled once a loss."""
    found = compiled(loss, make_loss)(params, batch, frozen, hyper)
    (value, (count, metrics)), gradients = jax.tree.map(np.asarray, found)
    return value, gradients, metrics | {"count": count}


@functools.cache
def logits(context):
    """Student's and teacher's logits of every token of PLAIN, taken from whole rows."""
    model, params = small()

    @jax.jit
    def of(params, tokens, segments):
        return model.logits(params, model.hidden(params, tokens, segments).states)

    student = of(params, PLAIN.tokens, PLAIN.segments)
    batch = WITH_CONTEXT if context else PLAIN._replace(teacher_tokens=PLAIN.tokens, teacher_segments=PLAIN.segments)
    taught = of(teacher(), batch.teacher_tokens, batch.teacher_segments)[:, len(CONTEXT) if context else 0 :]
    shifted = (np.roll(np.asarray(x, np.float64), 1, axis=1) for x in (student, taught))
    return dict(zip(("logits", "teacher_logits"), shifted, strict=True), mask=PLAIN.mask)


@pytest.mark.parametrize(
    "loss, hyper",
    [
        (losses.distill_forward_kl, {}),
        (losses.distill_reverse_kl, {}),
        (losses.generalised_jsd, {"beta": 0.3, "temperature": 2.0}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("context", [False, True])
def test_the_loss_is_that_of_whole_distributions(loss, hyper, context):
    batch = WITH_CONTEXT if context else PLAIN
    value, (slope, none), metrics = total(batch, small()[1], {"teacher": teacher()}, hyper, loss)
    expected = getattr(references, loss.__name__)(logits(context), **hyper)[PLAIN.mask].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert max(np.abs(x).max() for x in jax.tree.leaves(slope)) > 1e-4
    assert all(np.all(x == 0) for x in jax.tree.leaves(none))  # the teacher is a constant
    assert metrics["misaligned"] == 0


def test_one_model_that_reads_the_same_has_nothing_to_learn():
    _, params = small()
    value, (slope, _), _ = total(PLAIN, params, {"teacher": params}, {})
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    assert all(np.all(np.abs(x) < 1e-6) for x in jax.tree.leaves(slope))
    value, _, _ = total(WITH_CONTEXT, params, {"teacher": params}, {})
    assert value > 1e-3  # and of what the context changes, something


def test_columns_in_blocks_are_columns():
    """Rows enough for the vocabulary to be met in several blocks, the last one not full."""
    twice = jax.tree.map(lambda x: np.concatenate([x, x, x]), WITH_CONTEXT)
    (once, _, of_once), (more, _, of_more) = (
        total(batch, small()[1], {"teacher": teacher()}, {}) for batch in (WITH_CONTEXT, twice)
    )
    np.testing.assert_allclose(more, once, rtol=1e-5)
    assert of_more["count"] == 3 * of_once["count"] == 3 * PLAIN.mask.sum()


def test_what_the_teacher_does_not_say_is_left_out_and_counted():
    batch = WITH_CONTEXT._replace(teacher_tokens=WITH_CONTEXT.teacher_tokens.copy())
    row, column = 0, np.flatnonzero(PLAIN.mask[0])[1]
    batch.teacher_tokens[row, len(CONTEXT) + column] ^= 1
    short = batch.teacher_mask.copy()
    last = np.flatnonzero(short[3])[-1]
    short[3, last] = False
    batch = batch._replace(teacher_mask=short)
    frozen = {"teacher": teacher()}
    _, _, metrics = total(batch, small()[1], frozen, {})
    np.testing.assert_allclose(metrics["misaligned"], 2 / PLAIN.mask.sum(), rtol=1e-6)
    known = jax.tree.map(jnp.asarray, batch)
    count = PLAIN.mask[0].sum()
    expected = rf"row 0 has {count} tokens to learn, the teacher's {count}; expected the same tokens in the same order"
    with pytest.raises(ValueError, match=expected):
        distillation.make_loss(small()[0])(small()[1], known, frozen, {})


def test_a_token_without_anything_before_it_is_not_learned():
    mask = PLAIN.mask.copy()
    mask[0, 0] = True
    both = after_context(PLAIN._replace(mask=mask))
    frozen = {"teacher": teacher()}
    value, _, metrics = total(both, small()[1], frozen, {})
    expected, _, _ = total(WITH_CONTEXT, small()[1], frozen, {})
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["misaligned"], 1 / mask.sum(), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.distill_top_k, losses.distill_top_k_renormalised], ids=lambda f: f.__name__)
def test_answers_stored_ahead_are_those_of_the_teacher(loss):
    model, params = small()
    stored = jax.jit(functools.partial(distillation.teacher_top_k, model, k=5))(teacher(), WITH_CONTEXT)
    assert stored.top_ids.shape == (*PLAIN.tokens.shape, 5) and stored.teacher_tokens is None
    value, (slope, _), _ = total(stored, params, None, {}, loss, distillation.make_top_k_loss)

    def at_once(logits, teacher_logits, mask):
        return loss(logits, *jax.lax.top_k(jax.nn.log_softmax(teacher_logits), 5), mask)

    expected, (expected_slope, _), _ = total(WITH_CONTEXT, params, {"teacher": teacher()}, {}, at_once)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), slope, expected_slope)
    dense = logits(True)
    ordered = np.argsort(-dense["teacher_logits"], axis=-1)[..., :5]
    logp = [[references.log_softmax(z) for z in row] for row in dense["teacher_logits"]]
    numbers = {"teacher_logp": np.take_along_axis(np.array(logp), ordered, axis=-1), "teacher_ids": ordered}
    looped = getattr(references, loss.__name__)(dense | numbers)[PLAIN.mask].mean()
    np.testing.assert_allclose(value, looped, rtol=1e-4)


def test_microbatches_and_fillers():
    weights = np.ones(ROWS, np.float32)
    weights[2] = 0
    batch = WITH_CONTEXT._replace(weights=weights)
    problem = Problem(distillation.make_loss, batch, {"teacher": teacher()}, {}, small)
    expected = three_updates(problem)
    tokens, taught = batch.tokens.copy(), batch.teacher_tokens.copy()
    tokens[2], taught[2] = 10_000, 9  # of a row that weighs nothing
    garbage = batch._replace(tokens=tokens, teacher_tokens=taught)
    assert_same(three_updates(problem, batch=garbage, microbatches=4), expected)


def test_what_is_missing_is_named():
    model, params = small()
    loss_fn = distillation.make_loss(model)
    for frozen in (None, params["head"]):
        with pytest.raises(ValueError, match=rf"frozen is a {type(frozen).__name__}; expected .*'teacher': params"):
            jax.eval_shape(loss_fn, params, PLAIN, frozen, {})
    part = PLAIN._replace(teacher_tokens=PLAIN.tokens)
    with pytest.raises(ValueError, match=r"or none of them, not \['teacher_tokens'\] alone"):
        jax.eval_shape(loss_fn, params, part, {"teacher": params}, {})
    with pytest.raises(ValueError, match="without top_logp and top_ids; expected what teacher_top_k returns"):
        jax.eval_shape(distillation.make_top_k_loss(model), params, PLAIN, None, {})


def test_a_teacher_of_another_vocabulary_is_refused():
    model, params = small()
    other = model._replace(logits=lambda params, states: model.logits(params, states)[..., 1:])
    loss_fn = distillation.make_loss(model, teacher_model=other)
    with pytest.raises(ValueError, match=rf"expected one vocabulary, not {VOCAB} tokens and {VOCAB - 1}"):
        jax.eval_shape(loss_fn, params, PLAIN, {"teacher": params}, {})
