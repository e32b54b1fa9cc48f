from itertools import chain, islice

import numpy as np
import pytest

from alignax.data import Position, TokenPair, TokenPrompt, TokenRow, batches, batching


def row(tokens, trained):
    return TokenRow(np.array(tokens, np.int32), np.array(trained, bool))


def rows_of(lengths):
    # Row i holds its own number, so that a batch tells which rows it took.
    return [row([i] * length, [0] + [1] * (length - 1)) for i, length in enumerate(lengths)]


def taken(batch):
    return [int(row[0]) for row, weight in zip(batch["tokens"], batch["weights"]) if weight]


def same(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
        assert got[name].dtype == value.dtype, name


def test_supervised():
    rows = [row([7, 2, 2], [0, 1, 1]), row([7, 8, 9, 2], [0, 0, 1, 1]), row([7, 2, 2], [0, 1, 1])]
    got = batching.supervised(rows, np.array([1, 1, 0], np.float32), width=5, pad_id=2)
    expected = {
        "tokens": np.array([[7, 2, 2, 2, 2], [7, 8, 9, 2, 2], [7, 2, 2, 2, 2]], np.int32),
        "segments": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32),
        "mask": np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool),
        "weights": np.array([1, 1, 0], np.float32),
    }
    same(got, expected)


def test_pairs():
    pair = TokenPair(row([7, 1], [0, 1]), row([7, 3, 4], [0, 1, 1]))
    got = batching.pairs([pair, pair], np.array([1, 0], np.float32), width=4)
    tokens, segments = [[7, 1, 0, 0], [7, 3, 4, 0]], [[1, 1, 0, 0], [1, 1, 1, 0]]
    expected = {
        "tokens": np.array([tokens, tokens], np.int32),
        "segments": np.array([segments, segments], np.int32),
        "mask": np.array([[[0, 1, 0, 0], [0, 1, 1, 0]], [[0] * 4, [0] * 4]], bool),
        "weights": np.array([1, 0], np.float32),
    }
    same(got, expected)


def test_prompts():
    rows = [TokenPrompt(np.array(t, np.int32), p, {"answer": a}) for t, p, a in (([1, 5], "a", 3), ([1, 5, 6], "b", 4))]
    got = batching.prompts(rows, np.array([1, 1], np.float32), width=4, pad_id=9)
    assert (got.pop("prompts"), got.pop("columns")) == (["a", "b"], [{"answer": 3}, {"answer": 4}])
    expected = {
        "tokens": np.array([[1, 5, 9, 9], [1, 5, 6, 9]], np.int32),
        "lengths": np.array([2, 3], np.int32),
        "weights": np.array([1, 1], np.float32),
    }
    same(got, expected)


def test_plan_by_hand():
    # In order, two rows to a batch: rows 1 and 2 fill the bucket of 4, 0 and 4 that of 8; 3 is left over.
    assert batching.plan([5, 4, 1, 2, 8], batch_size=2, buckets=(8, 4)) == [(4, [1, 2]), (8, [0, 4]), (4, [3])]
    # What is left over in the bucket of 4 joins what is left over in that of 8.
    assert batching.plan([5, 4, 1, 2], batch_size=2, buckets=(4, 8)) == [(4, [1, 2]), (8, [3, 0])]
    assert batching.plan([1, 2, 5, 6, 9], batch_size=4, buckets=(4, 8, 16)) == [(8, [0, 1, 2, 3]), (16, [4])]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("count, batch_size", [(1, 4), (50, 4), (64, 8), (7, 1)])
def test_plan_shows_each_row_once_in_full_batches(seed, count, batch_size):
    lengths = np.random.default_rng(count).integers(1, 33, count)
    plan = batching.plan(lengths, batch_size=batch_size, buckets=(8, 16, 32), seed=seed)
    assert sorted(i for _, rows in plan for i in rows) == list(range(count))
    assert all(len(rows) == batch_size for _, rows in plan[:-1])
    assert all(width in (8, 16, 32) and lengths[rows].max() <= width for width, rows in plan)
    assert len(plan) == -(-count // batch_size)


def test_order_depends_on_seed_and_epoch_alone():
    plan = lambda **which: batching.plan([1] * 100, batch_size=10, buckets=[1], **which)  # noqa: E731
    assert plan(seed=1, epoch=2) == plan(seed=1, epoch=2)
    assert plan(seed=1, epoch=2) != plan(seed=1, epoch=3)
    assert plan(seed=1, epoch=2) != plan(seed=2, epoch=2)
    assert plan(seed=1, epoch=2) != plan(seed=2, epoch=1)
    np.random.seed(0)
    first = plan(seed=1)
    np.random.seed(1)
    assert first == plan(seed=1)


def test_last_batch_is_filled_with_rows_that_weigh_nothing():
    got = list(batches(rows_of([3, 3, 3]), batching.supervised, batch_size=2, buckets=(4,), seed=None, epochs=1))
    assert [position for _, position in got] == [Position(0, 1), Position(0, 2)]
    last = got[1][0]
    np.testing.assert_array_equal(last["weights"], [1, 0])
    np.testing.assert_array_equal(last["mask"], [[0, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(last["segments"], [[1, 1, 1, 0], [1, 1, 1, 0]])


def test_epochs_go_on_and_differ():
    stream = batches(rows_of([1] * 8), batching.supervised, batch_size=4, buckets=(1,), seed=5)
    first, second = ([taken(batch) for batch, _ in islice(stream, 2)] for _ in range(2))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(8))
    assert first != second


@pytest.mark.parametrize("seen", [1, 4, 5, 6, 11])
def test_resuming_goes_on_where_it_stopped(seen):
    lengths = np.random.default_rng(0).integers(1, 17, 18)
    options = dict(batch_size=4, buckets=(8, 16), seed=3, epochs=4)
    whole = list(batches(rows_of(lengths), batching.supervised, **options))
    assert len(whole) == 20
    rest = list(batches(rows_of(lengths), batching.supervised, start=whole[seen - 1][1], **options))
    assert [position for _, position in rest] == [position for _, position in whole[seen:]]
    for (got, _), (expected, _) in zip(rest, whole[seen:]):
        same(got, expected)


def test_processes_share_each_batch():
    lengths = np.random.default_rng(0).integers(1, 17, 18)
    options = dict(batch_size=4, buckets=(8, 16), seed=3, epochs=1)
    whole = list(batches(rows_of(lengths), batching.supervised, **options))
    parts = [list(batches(rows_of(lengths), batching.supervised, process=(i, 2), **options)) for i in range(2)]
    for (expected, _), (left, _), (right, _) in zip(whole, *parts, strict=True):
        same({name: np.concatenate([left[name], right[name]]) for name in left}, expected)
    # Of the last batch, two rows, the second process holds none: it takes part all the same.
    np.testing.assert_array_equal(parts[1][-1][0]["weights"], [0, 0])


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([1, 9], {"buckets": (4, 8)}, r"row 1 has 9 tokens, more than the buckets \[4, 8\] hold"),
        ([1], {"buckets": ()}, r"row 0 has 1 tokens, more than the buckets \[\] hold"),
        ([], {}, "cannot make batches of 2 from 0 rows"),
        ([1], {"batch_size": 0}, "cannot make batches of 0 from 1 rows"),
        ([1], {"process": (0, 3)}, "process 0 of 3 has no equal share of 2 rows"),
        ([1], {"process": (2, 2)}, "process 2 of 2 has no equal share of 2 rows"),
    ],
)
def test_bad_arguments(lengths, options, message):
    options = {"batch_size": 2, "buckets": (8,)} | options
    with pytest.raises(ValueError, match=message):
        next(batches(rows_of(lengths), batching.supervised, **options))


def test_statistics():
    line = batching.statistics(rows_of([3, 4, 2]), batch_size=2, buckets=(4,))
    assert line == "3 rows, 9 tokens, 6 trained on; batches 56% full"  # 9 of 2 * 2 * 4
    pair = TokenPair(row([7, 1], [0, 1]), row([7, 3, 4], [0, 1, 1]))
    assert batching.statistics([pair], batch_size=1, buckets=(4,)) == "1 rows, 5 tokens, 3 trained on; batches 62% full"
    prompt = TokenPrompt(np.array([1, 2], np.int32), "a", {})
    assert batching.statistics([prompt], batch_size=1, buckets=(4,)).startswith("1 rows, 2 tokens, 0 trained")
