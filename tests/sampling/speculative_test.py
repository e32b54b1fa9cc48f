"""Speculative decoding against the closed form of what it must not change, plain loops and a forward pass."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from references import toys

from alignax.models import decoding
from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.sampling import Settings, draft_model, drafts, draw, generate, ngram, speculate
from alignax.sampling.loop import State

PROMPTS = np.array([[1, 2, 3, 4, 5], [6, 1, 0, 9, 9], [3, 9, 9, 9, 9]], np.int32)  # 9: padding, not in the vocabulary
LENGTHS = np.array([5, 3, 1], np.int32)
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@functools.cache
def sampler(model, draft, **static):
    """Compiled once for all tests that use it."""
    return jax.jit(functools.partial(speculate, model, draft=draft, **static))


@functools.cache
def drafted(model):
    return draft_model(model)


copied = functools.cache(ngram)


def arrays(*values):
    return [jnp.asarray(value) for value in values]


def tables(seed=5, size=5):
    return np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)


@functools.cache
def parameters(model, seed):
    return drawn(model, seed=seed, scale=0.4)


@functools.cache
def llama():
    """A tiny random decoder, its parameters and its forward pass: rows [R, 16] -> logits [R, 16, V].

    Its positions end where its context does, and its cache has more slots than asked for, as those for kernels have:
    what is fed from behind the context would leave NaN there.
    """
    config = TransformerConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_positions=16,
        learned_positions=True,
        initializer_range=0.4,
    )
    model = transformer(config)
    model = model._replace(
        fork=lambda cache, lengths, group, slots: decoding.fork(config, cache, lengths, group, slots + 8)
    )
    params = parameters(model, 1)
    forward = jax.jit(lambda *row: model.logits(params, model.hidden(params, *row).states))
    return model, params, lambda tokens, segments: np.asarray(forward(*arrays(tokens, segments)))


def bent(logits, row, setting, process=None):
    """The distribution that is drawn from, by sorting."""
    z = np.asarray(logits, np.float64)
    held, penalty = np.isin(np.arange(len(z)), row), setting["repetition_penalty"]
    z = np.where(held, np.where(z > 0, z / penalty, z * penalty), z)
    z = process(z, row) if process else z
    p = np.exp(toys.log_softmax(z / setting["temperature"]))
    order = np.argsort(-p)
    if setting["top_k"]:
        p[order[setting["top_k"] :]] = 0
    p[order[1:]] *= (np.cumsum(p[order]) / p.sum() < setting["top_p"])[:-1]
    return p / p.sum()


def joint(reference, prompt, count, setting, process=None):
    """The probability of every completion of `count` tokens: an array with one axis for each of them."""
    size = len(reference(prompt))
    p = np.ones((size,) * count)
    for at in range(count):
        for before in itertools.product(range(size), repeat=at):
            row = [*prompt, *before]
            shape = (size,) + (1,) * (count - at - 1)
            p[before] *= bent(reference(row), row, setting, process).reshape(shape)
    return p


def assert_same_distribution(completions, p):
    """Chi-square of all three consecutive tokens, jointly; the normal approximation of its tail at 4 sigma."""
    rows, count = completions.shape
    for first in range(count - 2):
        others = tuple(axis for axis in range(count) if not first <= axis < first + 3)
        expected = rows * p.sum(axis=others)
        observed = np.zeros(expected.shape)
        np.add.at(observed, tuple(completions[:, first : first + 3].T), 1)
        assert np.all(observed[expected == 0] == 0)
        common = expected > 5
        chi = np.sum((observed - expected)[common] ** 2 / expected[common])
        chi += (observed - expected)[~common].sum() ** 2 / max(expected[~common].sum(), 5)
        assert chi <= common.sum() + 4 * np.sqrt(2 * common.sum()), (first, chi, common.sum())
        assert np.all(np.abs(observed - expected)[common] <= 4.5 * np.sqrt(expected[common]))


SETTINGS = {
    "plain": {},
    "filters": {"temperature": 0.9, "top_k": 4, "top_p": 0.8},
    "hot": {"temperature": 1.7, "top_k": 2},
    "penalty": {"temperature": 0.8, "repetition_penalty": 1.8},
}


def uniform_draft():
    """A draft of a user's own, which knows nothing."""

    def propose(carry, rows, count, distribution):
        columns = rows.ends[:, None] + jnp.arange(count)[None]
        number = jax.vmap(draw.uniforms, (None, 1), 1)(rows.keys, columns)[..., 0]
        return drafts.Proposal((number * 5).astype(jnp.int32), jnp.full((*number.shape, 5), 0.2), carry)

    return drafts.Draft(lambda *_, **__: (), propose)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("draft", [drafted(toys.chain()), copied(2)], ids=["chain", "ngram"])
def test_the_distribution_of_a_chain_is_unchanged(draft, setting, key):
    setting, table, prompt = PLAIN | setting, tables(), [0, 3, 1, 0, 2, 0]
    sample = sampler(toys.chain(), draft, draft_tokens=2, max_new_tokens=5, group=3000)
    samples, spent = sample(*arrays(table, [prompt], [6]), key, draft_params=jnp.asarray(tables(8)), **setting)
    assert 0.1 < spent.accepted.sum() / spent.proposed.sum() < 0.9
    assert_same_distribution(np.asarray(samples.tokens)[:, 6:], joint(lambda row: table[row[-1]], prompt, 5, setting))


def test_the_distribution_is_unchanged_by_a_draft_that_knows_nothing(key):
    table, prompt = tables(), [0, 3]
    sample = sampler(toys.chain(), uniform_draft(), draft_tokens=3, max_new_tokens=5, group=3000)
    samples, _ = sample(*arrays(table, [prompt], [2]), key)
    assert_same_distribution(np.asarray(samples.tokens)[:, 2:], joint(lambda row: table[row[-1]], prompt, 5, PLAIN))


def test_the_distribution_is_unchanged_where_a_draw_takes_two_numbers(key):
    """The same chain on five of 300 tokens, which lie in three blocks of `draw.categorical`."""
    ids = np.array([0, 7, 130, 200, 299])
    wide, of_draft = np.full((2, 300, 300), -1e9, np.float32)
    wide[np.ix_(ids, ids)], of_draft[np.ix_(ids, ids)], table = tables(), tables(8), tables()
    sample = sampler(toys.chain(), drafted(toys.chain()), draft_tokens=2, max_new_tokens=4, group=4000)
    samples, _ = sample(*arrays(wide, [[7]], [1]), key, draft_params=jnp.asarray(of_draft))
    completions = np.searchsorted(ids, np.asarray(samples.tokens)[:, 1:])
    np.testing.assert_array_equal(ids[completions], samples.tokens[:, 1:])
    assert_same_distribution(completions, joint(lambda row: table[row[-1]], [1], 4, PLAIN))


def test_a_draft_may_have_no_proposal(key):
    """-1 is not the last token of the vocabulary, which would be taken for it as often as that is drawn."""
    none = drafts.Draft(
        lambda *_, **__: (),
        lambda carry, rows, count, _: drafts.Proposal(jnp.full((len(rows.ends), count), -1), None, carry),
    )
    table = tables()
    sample = sampler(toys.chain(), none, draft_tokens=2, max_new_tokens=3, group=3000)
    samples, spent = sample(*arrays(table, [[0, 3]], [2]), key)
    assert np.all(spent.accepted == 0)
    assert_same_distribution(np.asarray(samples.tokens)[:, 2:], joint(lambda row: table[row[-1]], [0, 3], 3, PLAIN))


def never_the_last_but_one(logits, tokens, columns):
    last = jnp.take_along_axis(tokens, columns[:, None] - 2, axis=1)
    return jnp.where(jnp.arange(7)[None] == last, -jnp.inf, logits)


@pytest.mark.parametrize("setting", [PLAIN, PLAIN | {"repetition_penalty": 1.5, "top_p": 0.9}], ids=["plain", "bent"])
def test_the_distribution_of_what_sees_everything_is_unchanged(setting, key):
    """The cache of model and draft, and what a process sees, are right for every proposal and after every rejection."""
    model, params, reference = toys.history()
    other = toys.history(seed=1)[1] * 0.3 + params * 0.7
    draft = drafted(model)
    sample = sampler(model, draft, draft_tokens=2, max_new_tokens=4, group=3000, process=(never_the_last_but_one,))
    samples, spent = sample(params, *arrays([PROMPTS[1]], [3]), key, draft_params=other, **setting)
    assert 0.1 < spent.accepted.sum() / spent.proposed.sum() < 0.95

    def process(z, row):
        return np.where(np.arange(7) == row[-2], -np.inf, z)

    p = joint(reference, [6, 1, 0], 4, setting, process)
    assert_same_distribution(np.asarray(samples.tokens)[:, 3:7], p)


def greedy_loop(forward, prompts, lengths, room, ends_it):
    """One token after the other, each from a forward pass of the whole row."""
    tokens, ends = np.zeros((len(prompts), prompts.shape[1] + room), np.int32), lengths.copy()
    for row, length in enumerate(lengths):
        tokens[row, :length] = prompts[row, :length]
        while ends[row] < length + room and (ends[row] == length or tokens[row, ends[row] - 1] not in ends_it):
            logits = forward(tokens, np.arange(tokens.shape[1]) < ends[:, None])[row, ends[row] - 1]
            tokens[row, ends[row]] = np.argmax(logits)
            ends[row] += 1
    return tokens, ends


def from_llama(kind, draft_params, prompts, lengths, key, *, temperature, top_k=0, top_p=1.0):
    """Two completions of up to ten tokens for each prompt, by one compiled function for each kind of draft."""
    model, params, _ = llama()
    draft = drafted(model) if kind == "model" else copied(3)
    sample = sampler(model, draft, draft_tokens=3, max_new_tokens=10, group=2, eos_ids=(19, 31))
    settings = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    return sample(params, *arrays(prompts, lengths), key, draft_params=draft_params, **settings)


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_greedy_is_the_plain_loop_with_any_draft(kind, key):
    model, params, forward = llama()
    prompts, lengths = np.asarray(jax.random.randint(key, (3, 6), 0, 32)), np.array([6, 2, 4])
    tokens, ends = greedy_loop(forward, prompts, lengths, 10, (19, 31))
    assert np.any(ends < lengths + 10) and np.any(ends == lengths + 10)
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=10, eos_ids=(19, 31)))
    plain = sample(params, *arrays(prompts, lengths), key, temperature=0.0)
    np.testing.assert_array_equal(plain.tokens, tokens)
    halfway = jax.tree.map(lambda a, b: a + 0.05 * b, params, parameters(model, 2))
    for draft_params in (params, halfway, parameters(model, 7)):
        samples, spent = from_llama(kind, draft_params, prompts, lengths, key, temperature=0)
        np.testing.assert_array_equal(samples.tokens, np.repeat(tokens, 2, axis=0))
        np.testing.assert_array_equal(samples.segments.sum(axis=1), np.repeat(ends, 2))
        np.testing.assert_allclose(samples.logp[::2], plain.logp, atol=1e-5)
        assert np.all(np.asarray(samples.processed_logp) == 0)
        assert np.all(spent.rounds <= samples.lengths) and np.all(spent.accepted <= spent.proposed)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_draft_equal_to_the_model_is_always_right(temperature, key):
    _, params, _ = llama()
    prompts = jax.random.randint(key, (3, 6), 0, 32)
    samples, spent = from_llama("model", params, prompts, [6, 1, 4], key, temperature=temperature, top_p=0.95)
    np.testing.assert_array_equal(spent.rounds, -(-np.asarray(samples.lengths) // 4))
    np.testing.assert_array_equal(spent.accepted, samples.lengths - samples.lengths // 4)
    assert len(set(samples.lengths.tolist())) > 1 or temperature == 0


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_logp_equals_the_trainers(kind, key):
    model, params, forward = llama()
    draft_params = jax.tree.map(lambda a, b: a + 0.3 * b, params, parameters(model, 2))
    prompts = jax.random.randint(key, (3, 6), 0, 32)
    samples, _ = from_llama(kind, draft_params, prompts, [6, 2, 4], key, temperature=0.7, top_k=9)
    logits = forward(samples.tokens, samples.segments)
    for row, column in zip(*np.nonzero(np.asarray(samples.mask))):
        z, token = logits[row, column - 1], samples.tokens[row, column]
        assert abs(samples.logp[row, column] - toys.log_softmax(z / 0.7)[token]) <= 1e-5
        p = bent(z, [], PLAIN | {"temperature": 0.7, "top_k": 9})
        assert abs(samples.processed_logp[row, column] - np.log(p[token])) <= 1e-5
    assert np.all(np.asarray(samples.logp)[~np.asarray(samples.mask)] == 0)


STOP = ((3, 4), (5, 6, 1), (0, 0))
LIMITS = np.tile(np.arange(40) % 9 + 1, 3)


def of_history(draft, prompts, lengths, key, ids):
    """Forty completions of each of three prompts by the model that sees everything."""
    model, params, _ = toys.history()
    static = {"draft_tokens": 3, "max_new_tokens": 9, "group": 40, "eos_ids": (2,), "stop": STOP}
    varied = {"draft_params": params * 0.7, "temperature": 2.5, "max_tokens": jnp.asarray(LIMITS)}
    return sampler(model, draft, **static)(
        params, *arrays(prompts, lengths), key, row_ids=jnp.asarray(ids, jnp.int32), **varied
    )


@pytest.mark.parametrize("draft", [drafted(toys.history()[0]), copied(3)], ids=["history", "ngram"])
def test_rows_end_at_the_first_of_eos_stop_and_their_own_limit(draft, key):
    reference = toys.history()[2]
    samples, spent = of_history(draft, PROMPTS, LENGTHS, key, np.arange(120))
    tokens, segments, mask, logp, lengths, truncated, _ = map(np.asarray, samples)
    assert 20 < truncated.sum() < 100
    reasons, over = set(), set()
    for row in range(120):
        start = LENGTHS[row // 40]
        end = start + lengths[row]
        completion = tuple(tokens[row, start:end].tolist())
        for size in range(1, len(completion) + 1):
            part = completion[:size]
            over = {stop for stop in ((2,), *STOP) if part[-len(stop) :] == stop}
            assert bool(over or size == LIMITS[row]) == (size == len(completion))
        reasons |= over
        assert bool(over) != truncated[row]
        np.testing.assert_array_equal(tokens[row, :start], PROMPTS[row // 40, :start])
        np.testing.assert_array_equal(segments[row], np.arange(14) < end)
        np.testing.assert_array_equal(mask[row], (np.arange(14) >= start) & (np.arange(14) < end))
        assert np.all(tokens[row, end:] == 0) and np.all(logp[row][~mask[row]] == 0)
        for column in range(start, end):
            expected = toys.log_softmax(reference(tokens[row, :column]) / 2.5)[tokens[row, column]]
            assert abs(logp[row, column] - expected) <= 1e-5
    assert reasons == {(2,), *STOP}
    assert np.all(spent.accepted <= lengths) and np.all(lengths <= spent.accepted + spent.rounds)


def of_chain(table, draft_table, prompts, key, temperature):
    sample = sampler(toys.chain(), drafted(toys.chain()), draft_tokens=3, max_new_tokens=7)
    draft_params = jnp.asarray(draft_table)
    return sample(*arrays(table, prompts, [1, 1]), key, draft_params=draft_params, temperature=temperature)


def test_greedy_takes_the_first_of_equals(key):
    tied = np.array([[0.0, 2.0, 2.0, 1.0, 2.0]] * 5, np.float32)
    for draft_table in (tied, tables()):
        samples, _ = of_chain(tied, draft_table, [[0], [2]], key, temperature=0.0)
        assert samples.tokens[:, 1:].tolist() == [[1] * 7] * 2


def test_rounds_are_counted(key):
    # the model counts 1 2 3 4 0 1 ..., and so does the draft, but for the 1 that it takes to follow 3
    counting = 90.0 * np.roll(np.eye(5), 1, axis=1).astype(np.float32)
    mistaken = counting.copy()
    mistaken[3] = 90.0 * np.eye(5)[1]
    samples, spent = of_chain(counting, mistaken, [[0], [2]], key, temperature=1.0)
    assert samples.tokens.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [2, 3, 4, 0, 1, 2, 3, 4]]
    # (1 2 3) 4 | (0 1 2); and (3) 4 | (0 1 2) 3 | 4 with room for one proposal, a wrong one
    assert [x.tolist() for x in spent] == [[2, 3], [6, 7], [6, 4]]


def test_ngrams_copy_the_latest_place_that_agrees_most():
    def proposed(longest, count, *rows):
        ends = np.array([len(row) for row in rows])
        tokens = np.array([row + [0] * (12 - len(row)) for row in rows], np.int32)
        tokens, ends = arrays(tokens, ends)
        settings = Settings.make(len(rows), max_new_tokens=1)
        state = State((), tokens, tokens, tokens, ends, ends, ends > 0, ends, settings)
        propose = jax.jit(lambda state: ngram(longest).propose((), state, count, lambda *_: tokens).tokens)
        return propose(state).tolist()

    row = [1, 2, 3, 7, 2, 3, 8, 4, 3, 9, 2, 3]
    assert proposed(2, 3, row) == [[8, 4, 3]]  # the later of the two places of (2, 3)
    assert proposed(1, 3, row) == [[9, 2, 3]]
    assert proposed(3, 3, [7, 2, 3, 5, 1, 2, 3, 6, 7, 2, 3]) == [[5, 1, 2]]  # three agree, if earlier
    # what runs past the end goes on in its period; no place that agrees; a row of one token
    assert proposed(2, 5, [4, 1, 2, 1, 2], [1, 2, 3], [6]) == [[1, 2, 1, 2, 1], [3] * 5, [6] * 5]


def test_a_row_is_the_same_in_every_batch(key):
    draft, ids = drafted(toys.history()[0]), np.arange(100, 220).reshape(3, 40)
    first = of_history(draft, PROMPTS, LENGTHS, key, ids.ravel())
    order = np.array([2, 0, 1])
    moved = of_history(draft, PROMPTS[order], LENGTHS[order], key, ids[order].ravel())
    others = PROMPTS.copy()
    others[1:] = [[0, 5, 4, 3, 1], [2, 2, 0, 1, 1]]
    beside = of_history(draft, others, [5, 4, 5], key, [*ids[0], *range(80)])
    for leaf, other, third in zip(*map(jax.tree.leaves, (first, moved, beside))):
        leaf, other, third = (np.asarray(x).reshape(3, 40, -1) for x in (leaf, other, third))
        np.testing.assert_array_equal(third[0], leaf[0])
        np.testing.assert_array_equal(other, leaf[order])
    again = of_history(draft, PROMPTS, LENGTHS, key, ids.ravel() + 500)
    assert again[0].tokens.tolist() != first[0].tokens.tolist()


def test_no_value_compiles_anew(key):
    traced = []

    def logits(params, states):
        traced.append(1)
        return states

    sample = sampler(toys.chain()._replace(logits=logits), copied(1), draft_tokens=2, max_new_tokens=4, eos_ids=(2,))
    table = jax.random.normal(key, (5, 5))
    for temperature, top_k, top_p, max_tokens in [
        (1.0, 0, 1.0, 4),
        (0.0, 0, 1.0, 1),
        (0.5, 3, 1.0, 2),
        (2.0, 0, 0.5, 3),
    ]:
        values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_tokens": max_tokens}
        sample(table, *arrays([[4], [3]], [1, 1]), key, **values)
    assert len(traced) == 1


def of_shape(tokens, q):
    propose = lambda carry, *_: drafts.Proposal(jnp.zeros(tokens, jnp.int32), q and jnp.full(q, 0.2), carry)  # noqa: E731
    return drafts.Draft(lambda *_, **__: (), propose)


@pytest.mark.parametrize(
    ("error", "message", "keywords"),
    [
        (ValueError, r"draft_tokens=0; expected at least 1", {"draft_tokens": 0}),
        (TypeError, r"draft_tokens=True \(bool\); expected a static int", {"draft_tokens": True}),
        (ValueError, r"draft_params=None; expected the parameters of the draft model", {"draft_params": None}),
        (ValueError, r"q of shape \(2, 4, 7\); expected \(2, 4, 5\).*vocabulary", {"draft_params": jnp.zeros((7, 7))}),
        (ValueError, r"tokens of shape \(2, 3\); expected \(2, 4\)", {"draft": of_shape((2, 3), None)}),
        (ValueError, r"q of shape \(2, 3, 5\); expected \(2, 4, 5\)", {"draft": of_shape((2, 4), (2, 3, 5))}),
        (ValueError, r"need 18 positions.*16", {"draft": drafted(llama()[0]), "max_new_tokens": 15}),
        (ValueError, r"temperature=-1", {"temperature": -1}),
        (TypeError, r"unexpected keyword argument 'temprature'", {"temprature": 1}),
    ],
)
def test_refuses(error, message, keywords, key):
    given = {"draft": drafted(toys.chain()), "draft_params": jnp.zeros((5, 5)), "max_new_tokens": 4} | keywords
    rows = jnp.zeros((2, 3), jnp.int32), jnp.array([3, 1])
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda params: speculate(toys.chain(), params, *rows, key, **given), jnp.zeros((5, 5)))


def test_refuses_an_empty_ngram():
    with pytest.raises(ValueError, match=r"longest=0; expected at least 1"):
        ngram(0)
