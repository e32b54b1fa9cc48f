"""When rows end: against plain searches in completions that were sampled without an end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import toys

from alignax.sampling import generate

NEW = 12
COUNTING = 50.0 * jnp.roll(jnp.eye(5), 1, axis=1)  # 0 1 2 3 4 0 1 ...


@functools.cache
def sampler(model, **static):
    return jax.jit(functools.partial(generate, model, **static))


@functools.cache
def endless():
    """Sixteen completions of two prompts by a chain of three tokens."""
    table = jnp.asarray(np.random.default_rng(2).normal(0, 0.2, (3, 3)), jnp.float32)
    prompts, lengths = jnp.array([[0, 1, 1], [2, 0, 0]]), jnp.array([3, 1])
    sample = sampler(toys.chain(), max_new_tokens=NEW, group=8)

    def run(eos=(), stop=(), limit=NEW):
        return sample(
            table,
            prompts,
            lengths,
            jax.random.key(0),
            max_tokens=limit,
            eos_ids=as_array([eos])[0],
            stop=as_array(stop),
        )

    return run, run(), np.repeat([3, 1], 8)


def as_array(stop):
    """Two sequences of up to 15 ids: one shape, and so one program, for all tests."""
    found = np.full((2, 15), -1)
    for row, ids in zip(found, stop):
        row[15 - len(ids) :] = ids
    return jnp.asarray(found)


def end_of(completion, eos, stop, limit):
    """The tokens that stay and whether something ended them, by looking at every prefix."""
    for count in range(1, limit + 1):
        prefix = completion[:count]
        if prefix[-1] in eos or any(tuple(prefix[-len(s) :]) == tuple(s) for s in stop if len(s) <= count):
            return count, True
    return limit, False


@pytest.mark.parametrize("eos", [(), (2,)])
@pytest.mark.parametrize(
    "stop",
    [
        ((1,),),
        ((0, 0),),
        ((1, 0, 1),),
        ((0, 1), (1, 1, 2)),  # of several lengths
        ((1, 2, 1), (2, 1)),  # one is the end of another
        ((0, 0, 0), (0, 0, 1)),  # which overlap
        ((0, 1, 1, 0),),  # begins like the prompt
        (tuple(range(3)) * 5,),  # longer than any completion
    ],
    ids=str,
)
def test_rows_end_where_a_search_says(eos, stop):
    run, free, starts = endless()
    samples = run(eos, stop)
    ends = []
    for row, start in enumerate(starts):
        whole = np.asarray(free.tokens[row])
        count, stopped = end_of(whole[start : start + NEW].tolist(), eos, stop, NEW)
        keep = np.arange(len(whole)) < start + count
        np.testing.assert_array_equal(samples.tokens[row], np.where(keep, whole, 0))
        np.testing.assert_array_equal(samples.mask[row], keep & (np.arange(len(whole)) >= start))
        np.testing.assert_allclose(samples.logp[row], np.where(keep, free.logp[row], 0), atol=1e-6)
        assert bool(samples.truncated[row]) != stopped and int(samples.lengths[row]) == count
        ends.append(count)
    assert len(set(ends)) > 1 or (len(stop[0]) > NEW and not eos)


def test_max_tokens_of_each_row():
    run, free, starts = endless()
    limits = np.arange(16) % NEW + 1
    samples = run((), ((0, 0),), jnp.asarray(limits))
    for row, (start, limit) in enumerate(zip(starts, limits)):
        count, stopped = end_of(np.asarray(free.tokens[row])[start : start + NEW].tolist(), (), ((0, 0),), limit)
        assert int(samples.lengths[row]) == count and bool(samples.truncated[row]) != stopped
        np.testing.assert_array_equal(samples.tokens[row, : start + count], free.tokens[row, : start + count])
        assert not np.any(samples.tokens[row, start + count :]) and not np.any(samples.logp[row, start + count :])


def counted(prompt, new, **ends):
    """A completion of the chain that counts."""
    sample = sampler(toys.chain(), max_new_tokens=new)
    return sample(COUNTING, jnp.array([prompt]), jnp.array([len(prompt)]), jax.random.key(0), **ends)


def test_a_stop_sequence_does_not_begin_in_the_prompt():
    assert counted([1, 2], 9, stop=((2, 3),)).tokens.tolist() == [[1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]]
    assert counted([1, 2], 9, stop=((9, 3), (4, 0))).tokens.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0]]
    run = functools.partial(counted, [1, 2], 9)
    assert run(stop=as_array([(1, 2, 3, 4)])).tokens.tolist() == [[1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]]
    assert run(stop=as_array([(3,)])).tokens.tolist() == [[1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert run(stop=as_array([(0,), ()])).lengths.tolist() == [3]


def test_the_last_token_may_be_the_one_that_ends():
    """And a sequence may be longer than the whole row."""
    for ids, truncated in (((3, 4), False), ((4,), False), ((0,), True), ((4, 0, 1, 2, 3, 4), True)):
        samples = counted([2], 2, stop=as_array([ids]))
        assert samples.tokens.tolist() == [[2, 3, 4]] and samples.truncated.tolist() == [truncated]
    assert counted([2], 2, eos_ids=(4,)).truncated.tolist() == [False]


def test_the_repetition_penalty_counts_prompt_and_completion(key):
    """Greedy, against a plain loop; the strength makes rows wander through the vocabulary."""
    model, params, reference = toys.history()
    prompts, lengths, penalties = np.array([[1, 2, 3], [6, 9, 9]]), np.array([3, 1]), np.array([3.0, 1.2])
    sample = sampler(model, max_new_tokens=NEW)
    samples = sample(
        params,
        jnp.asarray(prompts),
        jnp.asarray(lengths),
        key,
        temperature=0.0,
        repetition_penalty=jnp.asarray(penalties, jnp.float32),
    )
    for row, (length, penalty) in enumerate(zip(lengths, penalties)):
        tokens = prompts[row, :length].tolist()
        for _ in range(NEW):
            logits = own = reference(tokens)
            seen = np.isin(np.arange(7), tokens)
            logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
            tokens.append(int(np.argmax(logits)))
            assert abs(samples.logp[row, len(tokens) - 1] - toys.log_softmax(own)[tokens[-1]]) <= 1e-5
        assert samples.tokens[row, : len(tokens)].tolist() == tokens
    assert np.all(samples.processed_logp == 0)
