"""The sampler against distributions known in closed form, plain Python loops and the trainer's forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from references import toys
from references.processed import processed

from alignax import logprobs
from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.sampling import generate

PROMPTS = np.array([[1, 2, 3, 4, 5], [6, 1, 0, 9, 9], [3, 9, 9, 9, 9]], np.int32)  # 9: padding, not in the vocabulary
LENGTHS = np.array([5, 3, 1], np.int32)


@functools.cache
def sampler(model, **static):
    """Compiled once for all tests that use it."""
    return jax.jit(functools.partial(generate, model, **static))


def arrays(*values):
    return [jnp.asarray(value) for value in values]


@functools.cache
def llama():
    """A tiny random decoder, its parameters and its trainer's forward pass: rows [R, 16] -> logits [R, 16, V]."""
    config = TransformerConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_positions=16,
        initializer_range=0.4,
    )
    model = transformer(config)
    params = drawn(model, scale=0.4)
    forward = jax.jit(lambda *row: model.logits(params, model.hidden(params, *row).states))
    return model, params, lambda tokens, segments: np.asarray(forward(*arrays(tokens, segments)))


@functools.cache
def ragged():
    """Eight completions of each of three ragged prompts by the model that sees everything, EOS 2."""
    model, params, reference = toys.history()
    sample = sampler(model, max_new_tokens=9, group=8, eos_ids=(2,))
    return sample(params, *arrays(PROMPTS, LENGTHS), jax.random.key(3), temperature=0.8), reference


def test_rows_are_training_rows():
    samples, _ = ragged()
    tokens, segments, mask, logp, lengths, truncated, processed_logp = map(np.asarray, samples)
    assert tokens.shape == segments.shape == mask.shape == logp.shape == (24, 14)
    assert tokens.dtype == segments.dtype == lengths.dtype == np.int32
    assert logp.dtype == np.float32 and mask.dtype == truncated.dtype == bool
    np.testing.assert_array_equal(processed_logp, logp)  # nothing is bent here
    assert 0 < truncated.sum() < 24  # both kinds occur
    for row in range(24):
        start = LENGTHS[row // 8]
        end = start + lengths[row]
        np.testing.assert_array_equal(tokens[row, :start], PROMPTS[row // 8, :start])
        np.testing.assert_array_equal(segments[row], np.arange(14) < end)
        np.testing.assert_array_equal(mask[row], (np.arange(14) >= start) & (np.arange(14) < end))
        assert np.all(tokens[row, end:] == 0) and np.all(logp[row][~mask[row]] == 0)
        completion = tokens[row, start:end].tolist()
        assert 2 not in completion[:-1]
        assert (completion[-1] == 2) != truncated[row]
        assert len(completion) == 9 or not truncated[row]
        assert np.all(logp[row][mask[row]] < 0)


def test_logp_is_the_models_own_at_the_temperature():
    samples, reference = ragged()
    for tokens, mask, logp in zip(*map(np.asarray, (samples.tokens, samples.mask, samples.logp))):
        for column in np.flatnonzero(mask):
            expected = toys.log_softmax(reference(tokens[:column]) / 0.8)[tokens[column]]
            assert abs(logp[column] - expected) <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logp_equals_the_trainers(key, temperature):
    model, params, forward = llama()
    sample = sampler(model, max_new_tokens=10, group=4, eos_ids=(2, 7))
    prompts = jax.random.randint(key, (3, 6), 0, 32)
    samples = sample(params, prompts, jnp.array([6, 2, 4]), key, temperature=temperature, top_k=9, top_p=0.95)
    assert len(set(samples.lengths.tolist())) > 2
    logits = forward(samples.tokens, samples.segments)[:, :-1] / temperature
    expected = np.take_along_axis(toys.log_softmax(logits), np.asarray(samples.tokens)[:, 1:, None], axis=-1)[..., 0]
    mask = np.asarray(samples.mask)[:, 1:]
    assert np.max(np.abs(np.asarray(samples.logp)[:, 1:] - expected)[mask]) <= 1e-5
    scores = logprobs.token_logprobs(
        model, params, samples.tokens, samples.segments, mask=samples.mask, temperature=temperature
    )
    assert np.max(np.abs(samples.logp - scores)) <= 1e-5


def bent(logits, temperature, top_k, top_p, min_p):
    """The distribution that is drawn from, by sorting."""
    p = np.exp(toys.log_softmax(logits / temperature))
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p[order[1:]] *= (np.cumsum(p[order]) / p.sum() < top_p)[:-1]
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def chain():
    """The chain as `toys.history` comes: the model, its parameters, and row -> the logits behind it."""
    table = np.random.default_rng(5).normal(size=(7, 7)).astype(np.float32)
    return toys.chain(), jnp.asarray(table), lambda row: table[row[-1]]


def tiny():
    """The same of the tiny decoder, by the trainer's forward pass."""
    model, params, forward = llama()

    def behind(row):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(row)] = row
        return forward(padded, np.arange(16)[None] < len(row))[0, len(row) - 1]

    return model, params, behind


BENT = [
    {"temperature": 0.7},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"top_k": 4, "forbidden": (1, 3)},
    {"temperature": 1.5, "top_p": 0.8, "repetition_penalty": 1.2},
    {"min_p": 0.2, "forbidden": (0, 5)},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.7, "forbidden": (2, 4)},
]


@pytest.mark.parametrize("build", [chain, toys.history, tiny])
def test_both_log_probabilities_of_every_token(build, key):
    """Under the model at the temperature, and under all that bends it; one row of each kind."""
    model, params, reference = build()
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    numbers = {name: jnp.asarray([one.get(name, value) for one in BENT]) for name, value in off.items()}
    forbidden = jnp.asarray([one.get("forbidden", (-1, -1)) for one in BENT])
    sample = sampler(model, max_new_tokens=8, group=2)
    samples = sample(params, *arrays(np.clip(PROMPTS, 0, 6), LENGTHS), key, **numbers, forbidden=forbidden)
    for row, setting in enumerate(BENT):
        tokens = np.asarray(samples.tokens[row])
        for column in np.flatnonzero(samples.mask[row]):
            logits, token = reference(tokens[:column]), tokens[column]
            after = processed(logits, tokens[:column], **setting)[token]
            own = toys.log_softmax(logits / (setting.get("temperature", 1.0) or 1.0))[token]
            assert abs(samples.logp[row, column] - own) <= 2e-5
            assert abs(samples.processed_logp[row, column] - after) <= 2e-5
    assert not np.any(np.asarray(samples.processed_logp[1]))  # the greedy row
    assert np.all(np.asarray(samples.processed_logp)[~np.asarray(samples.mask)] == 0)


@pytest.mark.parametrize(
    "setting",
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, 0, 0.7, 0.0),
        (1.5, 0, 1.0, 0.4),
        (0.9, 4, 0.8, 0.1),
    ],
)
def test_frequencies_of_a_known_chain(setting, key):
    table = np.random.default_rng(5).normal(size=(5, 5)).astype(np.float32)
    sample = sampler(toys.chain(), max_new_tokens=40, group=500)
    settings = dict(zip(("temperature", "top_k", "top_p", "min_p"), setting))
    samples = sample(jnp.asarray(table), *arrays([[0], [3]], [1, 1]), key, **settings)
    tokens = np.asarray(samples.tokens)
    for state in range(5):
        following = tokens[:, 1:][tokens[:, :-1] == state]
        p = bent(table[state], *setting)
        observed = np.bincount(following, minlength=5)
        assert len(following) > 50
        assert np.all(np.abs(observed - len(following) * p) <= 3 * np.sqrt(len(following) * p * (1 - p)) + 1e-6)
        logp = np.asarray(samples.logp)[:, 1:][tokens[:, :-1] == state]
        np.testing.assert_allclose(logp, toys.log_softmax(table[state] / setting[0])[following], atol=1e-5)


def test_greedy_is_the_plain_loop(key):
    model, params, forward = llama()
    prompts, lengths = np.asarray(jax.random.randint(key, (3, 6), 0, 32)), np.array([6, 2, 4])
    sample = sampler(model, max_new_tokens=10, eos_ids=(20, 31))
    samples = sample(params, *arrays(prompts, lengths), key, temperature=0.0)
    tokens, ends = np.zeros((3, 16), np.int32), lengths.copy()
    for row, length in enumerate(lengths):
        tokens[row, :length] = prompts[row, :length]
        while ends[row] < length + 10 and (ends[row] == length or tokens[row, ends[row] - 1] not in (20, 31)):
            logits = forward(tokens, np.arange(16) < ends[:, None])[row, ends[row] - 1]
            chosen = tokens[row, ends[row]] = np.argmax(logits)
            assert abs(samples.logp[row, ends[row]] - toys.log_softmax(logits)[chosen]) <= 1e-5
            ends[row] += 1
    np.testing.assert_array_equal(samples.tokens, tokens)
    np.testing.assert_array_equal(samples.segments.sum(axis=1), ends)
    assert np.any(ends < lengths + 10) and np.any(ends == lengths + 10)


def test_a_small_temperature_is_greedy_and_greedy_takes_the_first_of_equals(key):
    model, params, _ = toys.history()
    sample = sampler(model, max_new_tokens=6, group=4)
    rows = [sample(params, *arrays(PROMPTS, LENGTHS), key, temperature=t).tokens.tolist() for t in (0.0, 1e-4, 1e-38)]
    assert rows[0] == rows[1] == rows[2]
    tied = jnp.array([[0.0, 2.0, 2.0, 1.0, 2.0]] * 5)
    samples = sampler(toys.chain(), max_new_tokens=3)(tied, *arrays([[0]], [1]), key, temperature=0.0, top_p=0.9)
    assert samples.tokens.tolist() == [[0, 1, 1, 1]]


def test_eos_is_looked_for_in_the_completion_only(key):
    # a chain that counts 1 2 3 4 0 1 ...: EOS 1 is the first token of the prompt, and is chosen after 4 tokens
    counting = 50.0 * jnp.roll(jnp.eye(5), 1, axis=1)
    sample = sampler(toys.chain(), max_new_tokens=8, eos_ids=(1,))
    samples = sample(counting, *arrays([[1, 2], [3, 4], [1, 0]], [2, 1, 1]), key)
    assert samples.tokens.tolist() == [
        [1, 2, 3, 4, 0, 1, 0, 0, 0, 0],
        [3, 4, 0, 1, 0, 0, 0, 0, 0, 0],
        [1, 2, 3, 4, 0, 1, 0, 0, 0, 0],
    ]
    assert samples.lengths.tolist() == [4, 3, 5]
    assert samples.truncated.tolist() == [False] * 3
    assert samples.segments.sum(axis=1).tolist() == [6, 4, 6]


def test_the_loop_stops_when_every_row_is_done(key):
    steps = []

    def hidden(*args, **kwargs):
        jax.debug.callback(lambda: steps.append(1))
        return toys.chain().hidden(*args, **kwargs)

    counting = 50.0 * jnp.roll(jnp.eye(5), 1, axis=1)
    model = toys.chain()._replace(hidden=hidden)
    sampler(model, max_new_tokens=100, eos_ids=(4,))(
        counting, *arrays([[1], [2]], [1, 1]), key
    ).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(steps) == 1 + 3  # the prefill, and a step for each of the longest row's tokens


def test_one_new_token(key):
    model, params, reference = toys.history()
    samples = sampler(model, max_new_tokens=1, eos_ids=(2,))(params, *arrays(PROMPTS, LENGTHS), key)
    assert samples.lengths.tolist() == [1, 1, 1]
    assert samples.mask.sum(axis=1).tolist() == [1, 1, 1]
    for row, start in enumerate(LENGTHS):
        token = int(samples.tokens[row, start])
        assert abs(samples.logp[row, start] - toys.log_softmax(reference(PROMPTS[row, :start]))[token]) <= 1e-5
        assert bool(samples.truncated[row]) == (token != 2)


@pytest.mark.parametrize("build", [toys.history, llama])
def test_a_row_is_the_same_in_every_batch(build, key):
    model, params, _ = build()
    prompts, lengths = np.clip(PROMPTS, 0, 6), LENGTHS
    sample = sampler(model, max_new_tokens=8, eos_ids=(2,))
    ids = np.array([40, 41, 42])
    first = sample(params, *arrays(prompts, lengths), key, row_ids=jnp.asarray(ids))
    order = np.array([2, 0, 1])
    moved = sample(params, *arrays(prompts[order], lengths[order]), key, row_ids=jnp.asarray(ids[order]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), first, moved)
    # beside other prompts
    others, others_lengths = prompts.copy(), np.array([5, 4, 5])
    others[1:] = [[0, 5, 4, 3, 1], [2, 2, 0, 1, 1]]
    beside = sample(params, *arrays(others, others_lengths), key, row_ids=jnp.array([40, 7, 8]))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), first, beside)
    again = sample(params, *arrays(prompts, lengths), key, row_ids=jnp.asarray(ids + 3))
    assert again.tokens.tolist() != first.tokens.tolist()
    assert sample(params, *arrays(prompts, lengths), jax.random.key(9)).tokens.tolist() != first.tokens.tolist()


@pytest.mark.parametrize("build", [toys.history, llama])
def test_a_group_is_the_prompt_repeated(build, key):
    model, params, _ = build()
    prompts = np.clip(PROMPTS, 0, 6)
    grouped = sampler(model, max_new_tokens=8, group=4, eos_ids=(2,))(params, *arrays(prompts, LENGTHS), key)
    plain = sampler(model, max_new_tokens=8, eos_ids=(2,))
    repeated = plain(params, *arrays(np.repeat(prompts, 4, axis=0), np.repeat(LENGTHS, 4)), key)
    np.testing.assert_array_equal(grouped.tokens, repeated.tokens)
    np.testing.assert_allclose(grouped.logp, repeated.logp, atol=1e-5)
    assert len({tuple(row) for row in grouped.tokens.tolist()}) > 8
    # one of them beside other prompts
    prompts, lengths, ids = np.zeros((12, 5), np.int32), np.full(12, 4), np.arange(100, 112)
    prompts[7], lengths[7], ids[7] = PROMPTS[1], LENGTHS[1], 5
    beside = plain(params, *arrays(np.clip(prompts, 0, 6), lengths), key, row_ids=jnp.asarray(ids))
    np.testing.assert_array_equal(beside.tokens[7], grouped.tokens[5])


def test_a_sample_goes_on_where_it_was_cut(key):
    model, params, _ = toys.history()
    whole = sampler(model, max_new_tokens=8)(params, *arrays(PROMPTS, LENGTHS), key)
    half = sampler(model, max_new_tokens=3)(params, *arrays(PROMPTS, LENGTHS), key)
    rest = sampler(model, max_new_tokens=5)(params, half.tokens, jnp.asarray(LENGTHS) + half.lengths, key)
    np.testing.assert_array_equal(rest.tokens, whole.tokens)


def test_every_row_may_have_settings_of_its_own(key):
    model, params, _ = toys.history()
    sample = sampler(model, max_new_tokens=6, group=2)
    names = ("temperature", "top_k", "top_p", "min_p")
    values = [
        (1.0, 0, 1.0, 0.0),
        (0.0, 0, 1.0, 0.0),
        (2.0, 2, 1.0, 0.0),
        (1.0, 0, 0.5, 0.0),
        (1.0, 0, 1.0, 0.7),
        (0.5, 3, 0.9, 0.1),
    ]
    mixed = sample(params, *arrays(PROMPTS, LENGTHS), key, **dict(zip(names, arrays(*zip(*values)))))
    for row, setting in enumerate(values):
        same = sample(params, *arrays(PROMPTS, LENGTHS), key, **dict(zip(names, setting)))
        np.testing.assert_array_equal(mixed.tokens[row], same.tokens[row])
        np.testing.assert_allclose(mixed.logp[row], same.logp[row], atol=1e-6)


def test_no_value_compiles_anew(key):
    traced = []

    def logits(params, states):
        traced.append(1)
        return states

    sample = sampler(toys.chain()._replace(logits=logits), max_new_tokens=4, eos_ids=(2,))
    table = jax.random.normal(key, (5, 5))
    sample(table, *arrays([[0], [1]], [1, 1]), key, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    first = len(traced)
    for temperature, top_k, top_p, min_p in [
        (0.0, 0, 1.0, 0.0),
        (0.5, 3, 1.0, 0.0),
        (2.0, 0, 0.5, 0.1),
        (1e-3, 9, 1e-3, 1.0),
    ]:
        sample(table, *arrays([[4], [3]], [1, 1]), key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert len(traced) == first == 1


def test_process_changes_the_draw_and_not_logp(key):
    model, params, reference = toys.history()
    seen = []

    def forbid_the_last_token(logits, tokens, columns):
        seen.append((logits.shape, tokens.shape, columns.shape))
        last = jnp.take_along_axis(tokens, columns[:, None] - 1, axis=1)
        return jnp.where(jnp.arange(7)[None] == last, -jnp.inf, logits)

    def only_even(logits, tokens, columns):
        return jnp.where(jnp.arange(7)[None] % 2 == 0, logits, -jnp.inf)

    sample = sampler(model, max_new_tokens=8, group=5, process=(forbid_the_last_token, only_even))
    samples = sample(params, *arrays(PROMPTS, LENGTHS), key, top_k=2)
    assert set(seen) == {((15, 7), (15, 13), (15,))}
    for tokens, mask, logp in zip(*map(np.asarray, (samples.tokens, samples.mask, samples.logp))):
        for column in np.flatnonzero(mask):
            assert tokens[column] % 2 == 0 and tokens[column] != tokens[column - 1]
            expected = toys.log_softmax(reference(tokens[:column]))
            allowed = [t for t in (0, 2, 4, 6) if t != tokens[column - 1]]
            assert tokens[column] in sorted(allowed, key=lambda t: -expected[t])[:2]
            assert abs(logp[column] - expected[tokens[column]]) <= 1e-5


def test_logits_of_nan_are_seen_in_logp(key):
    samples = sampler(toys.chain(), max_new_tokens=3)(jnp.full((5, 5), jnp.nan), *arrays([[1]], [1]), key)
    assert np.all(np.isnan(samples.logp[0, 1:])) and np.all(samples.tokens[0, 1:] == 0)


def test_fills_the_context_to_the_last_position_and_no_further(key):
    model, params, _ = llama()
    sample = sampler(model, max_new_tokens=10, eos_ids=(99,))
    shapes = jax.eval_shape(sample, params, jnp.ones((2, 6), jnp.int32), jnp.array([6, 1]), key)
    assert shapes.tokens.shape == (2, 16)
    with pytest.raises(ValueError, match=r"width 6 and max_new_tokens=11 need 17 positions.*16"):
        generate(model, params, jnp.ones((2, 6), jnp.int32), jnp.array([6, 1]), key, max_new_tokens=11)


def trainers(model, params, samples):
    """log p of every token by the forward pass without a cache."""
    score = jax.jit(functools.partial(logprobs.token_logprobs, model))
    return score(params, samples.tokens, samples.segments, mask=samples.mask)


@functools.cache
def variant(**switches):
    """The tiny decoder with other switches."""
    model = transformer(dataclasses.replace(llama()[0].config, initializer_range=0.1, **switches))
    return model, drawn(model, scale=0.1)


def test_the_last_of_the_learned_positions_is_used(key):
    model, params = variant(learned_positions=True, layer_norm=True)
    samples = sampler(model, max_new_tokens=10)(params, jnp.ones((2, 6), jnp.int32), jnp.array([6, 3]), key)
    assert samples.segments.sum(axis=1).tolist() == [16, 13]
    np.testing.assert_allclose(samples.logp, trainers(model, params, samples), atol=1e-5)


@pytest.mark.parametrize(("vocab", "new"), [(3, 4), (130, 1)])
def test_one_prompt_of_one_token_and_a_group_of_five(vocab, new, key):
    """And a vocabulary of less than a block of the draw, or of a block and a little."""
    model, params = variant(vocab_size=vocab)
    samples = sampler(model, max_new_tokens=new, group=5)(params, jnp.array([[2]]), jnp.array([1]), key)
    assert samples.tokens.shape == (5, 1 + new) and samples.lengths.tolist() == [new] * 5
    assert int(samples.tokens.max()) < vocab and len({tuple(row) for row in samples.tokens.tolist()}) > 1
    np.testing.assert_allclose(samples.logp, trainers(model, params, samples), atol=1e-5)


def test_bfloat16(key):
    model, params = variant(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    samples = sampler(model, max_new_tokens=10, group=4)(
        params, jnp.array([[1, 2, 3], [4, 0, 0]]), jnp.array([3, 1]), key
    )
    assert samples.logp.dtype == jnp.float32
    np.testing.assert_allclose(samples.logp, trainers(model, params, samples), atol=2e-2)


def test_adapters_beside_frozen_weights_sample_as_the_merged_weights_do(key):
    """Any tree will do for parameters: here a product of two thin matrices is added to a projection."""
    model, base, _ = llama()
    merges = []
    rng = np.random.default_rng(0)
    thin = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("a", (2, 16, 3)), ("b", (2, 3, 16)))
    }

    def merged(params, where=""):
        if "adapters" not in params:
            return params["base"]
        merges.append(where)
        layers = params["base"]["layers"]
        kernel = layers["attn"]["q"]["kernel"] + params["adapters"]["a"] @ params["adapters"]["b"]
        return params["base"] | {"layers": layers | {"attn": layers["attn"] | {"q": {"kernel": kernel}}}}

    adapted = model._replace(
        hidden=lambda params, *rows, **options: model.hidden(merged(params, "prompts"), *rows, **options),
        logits=lambda params, states: model.logits(params["base"], states),
        unroll=lambda params: {"base": model.unroll(merged(params, "steps"))},
    )
    params = {"base": base, "adapters": thin}
    arguments = (*arrays(np.clip(PROMPTS, 0, 6), LENGTHS), key)
    found = sampler(adapted, max_new_tokens=8, group=4, eos_ids=(2,))(params, *arguments)
    assert merges == ["prompts", "steps"]  # once for all steps
    plain = sampler(model, max_new_tokens=8, group=4, eos_ids=(2,))
    expected = plain(merged(params), *arguments)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp, expected.logp, atol=1e-6)
    assert plain(base, *arguments).tokens.tolist() != found.tokens.tolist()


def test_lengths_that_jit_hides_and_that_are_wrong_show():
    model = toys.chain()
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=3))
    params, prompts = jnp.zeros((5, 5)), jnp.ones((4, 2), jnp.int32)
    samples = sample(params, prompts, jnp.array([0, 2, 3, -1]), jax.random.key(0))
    np.testing.assert_array_equal(jnp.any(samples.mask, axis=1), [False, True, False, False])
    np.testing.assert_array_equal(jnp.all(jnp.isnan(samples.logp), axis=1), [True, False, True, True])


def test_a_config_of_the_users_own_is_no_obstacle():
    model = toys.chain()._replace(config={"name": "mine"})
    prompts = jnp.ones((1, 1), jnp.int32)
    samples = generate(model, jnp.zeros((5, 5)), prompts, jnp.array([1]), jax.random.key(0), max_new_tokens=1)
    assert samples.tokens.shape == (1, 2)


def test_slots_that_grow_change_nothing(key):
    """From 64 new tokens on a row's own slots grow by quarters, a loop for each."""
    model, params, _ = llama()
    model = transformer(dataclasses.replace(model.config, max_positions=96))
    assert model.rooms(63) == (63,) and model.rooms(70) == (18, 35, 53, 70)
    prompts, lengths = arrays(np.clip(PROMPTS, 0, 6), LENGTHS)
    for count, settings in ((70, {"eos_ids": (99,)}), (70, {"max_tokens": jnp.array([20] * 5 + [70])})):
        static = {"max_new_tokens": count, "group": 2}
        growing = sampler(model, **static)(params, prompts, lengths, key, **settings)
        whole = sampler(model._replace(rooms=None), **static)(params, prompts, lengths, key, **settings)
        np.testing.assert_array_equal(growing.tokens, whole.tokens)
        np.testing.assert_array_equal(growing.lengths, whole.lengths)
        np.testing.assert_allclose(growing.logp, whole.logp, rtol=0, atol=1e-5)
