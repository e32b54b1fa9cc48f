"""Beam search against all sequences there are, a plain loop in float64, and the trainer's forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from references import toys

from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.sampling import beam_search, generate

PROMPTS = np.array([[1, 2, 3], [4, 1, 9], [3, 9, 9]], np.int32)  # 9: padding, not in the vocabulary
LENGTHS = np.array([3, 2, 1], np.int32)


@functools.cache
def searcher(model, **static):
    """Compiled once for all tests that use it."""
    return jax.jit(functools.partial(beam_search, model, **static))


def arrays(*values):
    return [jnp.asarray(value) for value in values]


@functools.cache
def chain():
    """Model, parameters and row -> log-probabilities."""
    table = np.random.default_rng(3).normal(size=(5, 5)).astype(np.float32)
    return toys.chain(), jnp.asarray(table), lambda row: toys.log_softmax(table[row[-1]])


@functools.cache
def history():
    model, params, reference = toys.history(5, seed=1)
    return model, params, lambda row: toys.log_softmax(reference(row))


@functools.cache
def llama():
    config = TransformerConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=12,
        initializer_range=0.5,
    )
    model = transformer(config)
    params = drawn(model, scale=0.5)
    forward = jax.jit(lambda *row: model.logits(params, model.hidden(params, *row).states)[0])

    @functools.cache
    def logp(row):
        tokens = np.zeros((1, 12), np.int32)
        tokens[0, : len(row)] = row
        return toys.log_softmax(forward(*arrays(tokens, np.arange(12)[None] < len(row)))[len(row) - 1])

    return model, params, lambda row: logp(tuple(map(int, row)))


def ending(*last):
    """Whether a completion ends with one of these."""
    return lambda tokens: any(tuple(tokens[-len(x) :]) == x for x in last if len(x) <= len(tokens))


def exhaustive(logp, prompt, *, ends, power, most, size=5):
    """Every completion there is as (score, tokens), best first."""
    found = []
    for length in range(1, most + 1):
        for tokens in itertools.product(range(size), repeat=length):
            cut = [n for n in range(1, length) if ends(tokens[:n])]
            if not cut and (ends(tokens) or length == most):
                row = [*prompt, *tokens]
                total = sum(logp(row[:i])[row[i]] for i in range(len(prompt), len(row)))
                found.append((total / length**power, tokens))
    return sorted(found, reverse=True)


def plain(logp, prompt, *, beams, ends, power, most):
    """The search with lists: it never stops before `most` tokens, so that a bound that is wrong shows."""
    live, finished = [(0.0, ())], []
    for length in range(1, most + 1):
        grown = sorted(
            ((total + p, (*tokens, t)) for total, tokens in live for t, p in enumerate(logp([*prompt, *tokens]))),
            reverse=True,
        )
        over = [ends(tokens) or length == most for _, tokens in grown]
        finished += [(total / length**power, tokens) for (total, tokens), end in zip(grown[:beams], over) if end]
        live = [beam for beam, end in zip(grown, over) if not end][:beams]
    return sorted(finished, reverse=True)


def check(found, expected, *, prompts=PROMPTS, lengths=LENGTHS, ends, new_tokens):
    """Rows and scores are the best of what is expected of each prompt, [(score, tokens), ...]; ties in any order."""
    samples, scores = jax.tree.map(np.asarray, found.samples), np.asarray(found.scores)
    keep, columns = len(scores) // len(prompts), np.arange(prompts.shape[1] + new_tokens)
    assert samples.tokens.shape == samples.logp.shape == (len(scores), len(columns))
    assert scores.dtype == samples.logp.dtype == np.float32
    for row in range(len(scores)):
        start, of_prompt = lengths[row // keep], expected[row // keep]
        end = start + samples.lengths[row]
        tokens = tuple(samples.tokens[row, start:end].tolist())
        score = {tokens: score for score, tokens in of_prompt}[tokens]
        assert abs(score - of_prompt[row % keep][0]) <= 1e-9 and abs(scores[row] - score) <= 1e-5
        assert not samples.tokens[row, end:].any()
        np.testing.assert_array_equal(samples.tokens[row, :start], prompts[row // keep, :start])
        np.testing.assert_array_equal(samples.segments[row], columns < end)
        np.testing.assert_array_equal(samples.mask[row], (columns >= start) & (columns < end))
        assert samples.truncated[row] == (not ends(tokens)) and not samples.logp[row, ~samples.mask[row]].any()
    assert len({(row // keep, *tokens) for row, tokens in enumerate(samples.tokens.tolist())}) == len(scores)


@pytest.mark.parametrize("power", [0.0, 0.7, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("build", [chain, history])
def test_a_beam_of_all_finds_the_best_there_are(build, power):
    model, params, logp = build()
    search = searcher(model, beams=130, max_new_tokens=4, keep=6, eos_ids=(2,))
    found = search(params, *arrays(PROMPTS, LENGTHS), length_penalty=power)
    settings = {"ends": ending((2,)), "power": power, "most": 4}
    expected = [exhaustive(logp, PROMPTS[row, :n], **settings) for row, n in enumerate(LENGTHS)]
    check(found, expected, ends=ending((2,)), new_tokens=4)


def no_repeats(logits, tokens, columns):
    last = jnp.take_along_axis(tokens, columns[:, None] - 1, axis=1)
    return jnp.where(jnp.arange(logits.shape[1])[None] == last, -jnp.inf, logits)


def bent(logp):
    """Without 0 and without the token before, normalised again."""

    def found(row):
        values = np.array(logp(row))
        values[[0, row[-1]]] = -np.inf
        return toys.log_softmax(values)

    return found


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_stop_sequences_processes_and_forbidden_tokens(power):
    model, params, logp = history()
    stop, ends = ((1, 3), (4, 2, 4), (2,)), ending((1, 3), (4, 2, 4), (2,))
    search = searcher(model, beams=130, max_new_tokens=4, keep=5, forbidden=(0,), process=(no_repeats,), stop=stop)
    found = search(params, *arrays(PROMPTS, LENGTHS), length_penalty=power)
    settings = {"ends": ends, "power": power, "most": 4}
    expected = [exhaustive(bent(logp), PROMPTS[row, :n], **settings) for row, n in enumerate(LENGTHS)]
    check(found, expected, ends=ends, new_tokens=4)
    tokens, mask, own, processed = map(np.asarray, (*found.samples[:1], *found.samples[2:4], found.samples[6]))
    for row, column in zip(*np.nonzero(mask)):
        token, before = tokens[row, column], tokens[row, :column]
        assert abs(own[row, column] - logp(before)[token]) <= 1e-5
        assert abs(processed[row, column] - bent(logp)(before)[token]) <= 1e-5


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("build", [history, llama])
def test_a_narrow_beam_is_the_plain_loop(build, beams, power):
    model, params, logp = build()
    search = searcher(model, beams=beams, max_new_tokens=9, keep=2, eos_ids=(2, 4))
    found = search(params, *arrays(PROMPTS, LENGTHS), length_penalty=power)
    settings = {"ends": ending((2,), (4,)), "power": power, "most": 9, "beams": beams}
    expected = [plain(logp, PROMPTS[row, :n], **settings) for row, n in enumerate(LENGTHS)]
    check(found, expected, ends=ending((2,), (4,)), new_tokens=9)
    for tokens, mask, own in zip(*map(np.asarray, (found.samples.tokens, found.samples.mask, found.samples.logp))):
        for column in np.flatnonzero(mask):
            assert abs(own[column] - logp(tokens[:column])[tokens[column]]) <= 1e-5
    np.testing.assert_array_equal(found.samples.processed_logp, found.samples.logp)


def test_prompts_may_have_settings_of_their_own():
    model, params, logp = history()
    most, powers, eos = [9, 1, 4], [0.0, 1.0, 2.0], [(2, 4), (3,), ()]
    search = searcher(model, beams=3, max_new_tokens=9, keep=2)
    numbers = {"max_tokens": jnp.array(most), "length_penalty": jnp.array(powers)}
    found = search(params, *arrays(PROMPTS, LENGTHS), **numbers, eos_ids=jnp.array([[2, 4], [3, -1], [-1, -1]]))
    rows = enumerate(zip(LENGTHS, most, powers, eos))
    settings = [(row, n, {"beams": 3, "ends": ending(*zip(e)), "power": p, "most": m}) for row, (n, m, p, e) in rows]
    expected = [plain(logp, PROMPTS[row, :n], **setting) for row, n, setting in settings]
    for row, (_, _, setting) in enumerate(settings):
        some = jax.tree.map(lambda leaf, row=row: leaf[2 * row : 2 * row + 2], found)
        here = {"prompts": PROMPTS[row : row + 1], "lengths": LENGTHS[row : row + 1], "ends": setting["ends"]}
        check(some, expected[row : row + 1], new_tokens=9, **here)


@pytest.mark.parametrize("build", [history, llama])
def test_one_beam_is_greedy(build):
    model, params, _ = build()
    settings = {"max_new_tokens": 9, "eos_ids": (2, 4, 5)}
    sample = jax.jit(functools.partial(generate, model, temperature=0.0, **settings))
    samples = sample(params, *arrays(PROMPTS, LENGTHS), jax.random.key(0))
    assert len(set(samples.lengths.tolist())) > 1
    for power in (0.0, 1.0, 3.0):
        found = searcher(model, beams=1, **settings)(params, *arrays(PROMPTS, LENGTHS), length_penalty=power)
        for name in ("tokens", "segments", "mask", "lengths", "truncated"):
            np.testing.assert_array_equal(getattr(found.samples, name), getattr(samples, name))
        np.testing.assert_allclose(found.samples.logp, samples.logp, atol=1e-5)
        scores = samples.logp.sum(axis=1) / samples.lengths.astype(jnp.float32) ** power
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_what_is_kept_are_the_first_of_more():
    model, params, _ = history()
    many = searcher(model, beams=3, max_new_tokens=9, keep=3, eos_ids=(2, 4))(params, *arrays(PROMPTS, LENGTHS))
    one = searcher(model, beams=3, max_new_tokens=9, eos_ids=(2, 4))(params, *arrays(PROMPTS, LENGTHS))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[::3], b), many, one)
    scores = np.asarray(many.scores).reshape(3, 3)
    assert np.all(scores[:, :-1] > scores[:, 1:])


def test_rows_that_do_not_exist_are_empty():
    model, params, _ = chain()
    prompts = arrays(PROMPTS, LENGTHS)
    found = searcher(model, beams=8, keep=7, max_new_tokens=1)(params, *prompts)
    exist = np.tile(np.arange(7) < 5, 3)
    np.testing.assert_array_equal(np.isfinite(found.scores), exist)
    np.testing.assert_array_equal(found.samples.mask.sum(axis=1), exist)
    np.testing.assert_array_equal(found.samples.lengths, exist)
    assert np.all(found.scores[~exist] == -np.inf) and not np.any(found.samples.logp[~exist])

    def nothing_after_a_token(logits, tokens, columns):
        return jnp.where(columns[:, None] > 3, -jnp.inf, logits)

    found = searcher(model, beams=3, keep=2, max_new_tokens=4, eos_ids=(2,), process=(nothing_after_a_token,))
    scores = np.asarray(found(params, *prompts).scores).reshape(3, 2)
    # from a prompt of 3 tokens only EOS is a whole completion, where it is among the three best
    logp = chain()[2](PROMPTS[0])
    expected = [logp[2] if np.sum(logp > logp[2]) < 3 else -np.inf, -np.inf]
    np.testing.assert_allclose(scores[0], expected, atol=1e-6)


def test_it_stops_when_nothing_can_enter_and_not_before():
    steps = []

    def hidden(*args, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return toys.chain().hidden(*args, **kwargs)

    # 0 ends at once or goes on at half that probability; 1 goes on for ever at next to no cost
    table = jnp.log(
        jnp.array([[0.05, 0.3, 0.025, 0.025, 0.6], [0.0025, 0.99, 0.0025, 0.0025, 0.0025]] + [[0.2] * 5] * 3)
    )
    search = searcher(toys.chain()._replace(hidden=hidden), beams=2, max_new_tokens=9, eos_ids=(4,))
    longest = (np.log(0.3) + 8 * np.log(0.99)) / 9
    for power, score, length, count in ((0.0, np.log(0.6), 1, 1), (1.0, longest, 9, 9)):
        steps.clear()
        found = search(table, *arrays([[0]], [1]), length_penalty=power)
        np.testing.assert_allclose(found.scores, [score], rtol=1e-5)
        assert found.samples.lengths.tolist() == [length]
        jax.effects_barrier()
        assert len(steps) == 1 + count  # the prefill, and a step for each token


def test_no_value_compiles_anew():
    traced = []

    def logits(params, states):
        traced.append(1)
        return states

    search = searcher(toys.chain()._replace(logits=logits), beams=2, max_new_tokens=4)
    for power, eos, most in ((1.0, 2, 4), (0.0, 3, 1), (-2.0, -1, 2)):
        settings = {"length_penalty": power, "eos_ids": jnp.array([eos]), "max_tokens": most}
        search(chain()[1], *arrays([[0], [eos + 1]], [1, 1]), **settings)
    assert len(traced) == 1


def test_nan_and_lengths_that_jit_hides_show():
    search = searcher(toys.chain(), beams=2, max_new_tokens=3)
    prompts = arrays([[1, 2], [1, 2], [3, 1], [3, 1]], [2, 0, 3, 1])
    found = search(chain()[1], *prompts)
    np.testing.assert_array_equal(np.isnan(found.scores), [False, True, True, False])
    np.testing.assert_array_equal(found.samples.mask.any(axis=1), [True, False, False, True])
    np.testing.assert_array_equal(np.isnan(found.samples.logp).all(axis=1), [False, True, True, False])
    assert np.isnan(search(jnp.full((5, 5), jnp.nan), *prompts).scores).all()


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, r"keep=3; expected at most beams=2", {"keep": 3}),
        (ValueError, r"beams=0; expected at least 1", {"beams": 0}),
        (TypeError, r"keep=True \(bool\); expected a static int", {"keep": True}),
        (ValueError, r"max_new_tokens=0; expected at least 1", {"max_new_tokens": 0}),
        (ValueError, r"length_penalty=nan", {"length_penalty": float("nan")}),
        (ValueError, r"length_penalty=inf", {"length_penalty": float("inf")}),
        (ValueError, r"length_penalty of shape \(2,\); expected one number or \(3,\)", {"length_penalty": jnp.ones(2)}),
        (ValueError, r"max_tokens=.*5.*; expected at most max_new_tokens=4", {"max_tokens": 5}),
        (TypeError, r"eos_ids=2; expected ints", {"eos_ids": 2}),
        (ValueError, r"eos_ids of shape \(6, 1\); expected \[N\] or \[3, N\]", {"eos_ids": np.ones((6, 1), int)}),
        (ValueError, r"lengths\[0\]=0, expected 1 to 3.*empty prompt", {"lengths": jnp.array([0, 1, 1])}),
        (ValueError, r"need 13 positions.*12", {"max_new_tokens": 10}),
    ],
)
def test_refuses(error, message, keywords):
    model, params, _ = llama()
    settings = {"beams": 2, "max_new_tokens": 4, "lengths": jnp.asarray(LENGTHS)} | keywords
    with pytest.raises(error, match=message):
        beam_search(model, params, jnp.asarray(PROMPTS), **settings)
