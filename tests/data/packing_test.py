"""Members grouped into rows: against plain loops, every member once, and nothing of a batch lost or invented."""

from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pytest

from alignax.algorithms import kto, preference, sft
from alignax.data import Position, TokenLabelled, TokenPair, TokenPrompt, TokenRow, batching, packing


def row(*tokens, prompt=1):
    return TokenRow(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def rows_of(lengths):
    # Row i holds its own number, so that a batch tells which rows it took.
    return [row(*[i] * length) for i, length in enumerate(lengths)]


def loop_first_fit(lengths, width, members):
    """Longest first, into the first row with room: one member at a time, one row at a time."""
    groups = []
    for i in sorted(range(len(lengths)), key=lambda i: -max(lengths[i])):
        for group in groups:
            sums = [sum(lengths[j][c] for j in [*group, i]) for c in range(len(lengths[i]))]
            if len(group) < members and max(sums) <= width:
                group.append(i)
                break
        else:
            groups.append([i])
    return [group + [-1] * (members - len(group)) for group in groups]


def test_first_fit_by_hand():
    # 6 and 4 fill a row of 10; 5, 3 and 2 the next; 3 is left for a third. Ties keep their order.
    np.testing.assert_array_equal(
        packing.first_fit([3, 5, 4, 6, 2, 3], width=10, members=3), [[3, 2, -1], [1, 0, 4], [5, -1, -1]]
    )
    # two members to a row at most; and a row more than is needed stays empty
    np.testing.assert_array_equal(
        packing.first_fit([1, 1, 1], width=10, members=2, rows=3), [[0, 1], [2, -1], [-1, -1]]
    )


@pytest.mark.parametrize("places, members", [(1, 50), (1, 3), (2, 8)])
def test_first_fit_is_the_plain_loop(places, members):
    lengths = np.random.default_rng(places).integers(0, 65, (300, places))
    got = packing.first_fit(lengths if places > 1 else lengths[:, 0], width=100, members=members)
    np.testing.assert_array_equal(got, loop_first_fit(lengths.tolist(), 100, members))
    np.testing.assert_array_equal(np.sort(got[got >= 0]), np.arange(300))


@pytest.mark.parametrize(
    "lengths, options, message",
    [
        ([3, 11, 4], {}, "member 1 has 11 tokens; expected at most width=10"),
        ([[3, 4], [5, 12]], {}, "member 1 has 12 tokens; expected at most width=10"),
        ([6, 6, 6], {"rows": 2}, "1 of 3 members, 18 tokens in all, find no place in 2 rows of width=10 and at most 3"),
        ([1, 1], {"rows": 0}, "rows=0, members=3; expected at least 1 of each"),
    ],
)
def test_what_does_not_fit_is_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        packing.first_fit(lengths, **{"width": 10, "members": 3} | options)


def random_pairs(count, width, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, width + 1, (count, 2))
    pairs = [TokenPair(*(row(*rng.integers(1, 99, n)) for n in sides)) for sides in lengths]
    return pairs, lengths


def check_slots(got, batch, index):
    """Every slot of every leaf is the member that the index names, or silent."""
    for (r, k), i in np.ndenumerate(index):
        assert got.weights[r, k] == (0 if i < 0 else batch.weights[i])
        for name in ("tokens", "segments", "mask"):
            found = getattr(got, name)[r, k]
            if i >= 0:
                np.testing.assert_array_equal(found, getattr(batch, name)[i])
            elif name != "tokens":
                assert not found.any()


def test_a_packed_batch_of_pairs_is_its_members_slot_by_slot():
    pairs, lengths = random_pairs(9, 12)
    arrays = batching.pairs(pairs, np.float32([1, 1, 0.5, 1, 0, 1, 1, 2, 1]), width=12)
    extra = {"margin": np.arange(9, dtype=np.float32), "reward": np.arange(18, dtype=np.float32).reshape(9, 2)}
    degraded = batching.supervised([row(*range(1, 2 + i)) for i in range(9)], arrays["weights"], width=12)
    rows = preference.Rows(degraded["tokens"], degraded["segments"], degraded["mask"])
    batch = preference.Batch(**arrays, extra=extra, degraded=rows)
    got, fill = packing.pack(batch, width=30)
    counted = [i for i in range(9) if i != 4]  # it weighs nothing
    sizes = [[int(lengths[i].sum()), i + 1] for i in counted]
    index = loop_first_fit(sizes, 30, 9)
    most = max(sum(i >= 0 for i in group) for group in index)
    index = np.array([[-1 if i < 0 else counted[i] for i in group[:most]] for group in index])
    assert got.tokens.shape == (*index.shape, 2, 12) and got.ref_logp is None
    check_slots(got, batch, index)
    full = index >= 0
    np.testing.assert_array_equal(got.extra["margin"][full], index[full])
    np.testing.assert_array_equal(got.extra["reward"][full], extra["reward"][index[full]])
    np.testing.assert_array_equal(got.degraded.segments[full], rows.segments[index[full]])
    assert not got.degraded.segments[~full].any() and not got.degraded.mask[~full].any()
    assert got.weights.dtype == np.float32 and got.tokens.dtype == np.int32 and got.mask.dtype == bool
    np.testing.assert_allclose(fill, lengths[counted].sum() / (len(index) * 30))


def test_weights_come_in_and_rows_may_be_empty():
    batch = batching.supervised(rows_of([4, 3, 2]), np.ones(3, np.float32), width=6)
    named = sft.Batch(**batch | {"weights": None})
    got, fill = packing.pack(named, width=6, rows=3, members=2)
    index = np.array([[0, 2], [1, -1], [-1, -1]])
    check_slots(got, named._replace(weights=np.ones(3)), index)
    assert fill == 9 / 18
    plain = {name: x for name, x in batch.items() if name != "weights"}
    np.testing.assert_array_equal(packing.pack(plain, width=6, rows=3, members=2).batch["weights"], index >= 0)
    silent, fill = packing.pack(batch | {"weights": np.zeros(3, np.float32)}, width=6)
    assert fill == 0 and silent["tokens"].shape == (1, 1, 6) and not silent["segments"].any()


class Unweighted(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segments": None}, r"a batch of \['mask', 'segments', 'tokens', 'weights'\]; expected segments among them"),
        ({"extra": {"gap": np.ones(2)}}, r"extra.gap of shape \(2,\); expected 3 rows, as many as of segments"),
        ({"prompts": ["a", "b", "c"]}, "prompts is a list; expected an array with a row for each member"),
        ({"beta": np.float32(1)}, r"beta of shape \(\); expected 3 rows"),
    ],
)
def test_batches_that_cannot_be_packed_are_refused(change, message):
    batch = batching.supervised(rows_of([4, 3, 2]), np.ones(3, np.float32), width=6)
    with pytest.raises(ValueError, match=message):
        packing.pack(batch | change, width=8)
    with pytest.raises(ValueError, match="and a place for weights"):
        packing.pack(Unweighted(batch["tokens"], batch["segments"]), width=8)


LENGTHS = np.clip(np.random.default_rng(1).lognormal(3.0, 0.9, 400), 2, 128).astype(int)
STREAM = dict(batch_rows=4, width=256, limit=128)


def taken(batch):
    return batch["tokens"][..., 0][batch["weights"] > 0].tolist()


def same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_an_epoch_shows_every_row_once_in_full_rows_of_one_shape():
    rows = rows_of(LENGTHS)
    for seed in (None, 3):
        steps = [batch for batch, _ in packing.packed_batches(rows, batching.supervised, seed=seed, epochs=1, **STREAM)]
        assert sorted(chain(*map(taken, steps))) == list(range(400))
        assert len({tuple(x.shape for x in batch.values()) for batch in steps}) == 1
        used = [np.count_nonzero(batch["segments"], axis=(1, 2)) for batch in steps]
        assert max(map(max, used)) <= 256
        assert min(map(sum, used[:-1])) > 0.93 * 4 * 256  # the last has what is left
        for batch in steps:  # each row whole, as `supervised` has it
            whole = batching.supervised([rows[i] for i in taken(batch)], np.ones(len(taken(batch))), width=128)
            full = batch["weights"] > 0
            same(
                {name: batch[name][full] for name in ("segments", "mask")}, {n: whole[n] for n in ("segments", "mask")}
            )
            assert not batch["segments"][~full].any() and not batch["mask"][~full].any()


def test_steps_stay_near_the_order_and_none_waits_for_ever():
    before = np.cumsum(LENGTHS) - LENGTHS  # tokens
    seen = []
    for number, step in enumerate(packing.plan(LENGTHS, rows=4, width=256, members=30), start=1):
        seen += step[step >= 0].tolist()
        assert set(np.flatnonzero(before < 0.8 * number * 1024)) <= set(seen)
        assert before[max(seen)] < (number + packing.AHEAD) * 1024
    # Longest first would fill both rows with 8s again and again, and 3 would come last.
    steps = packing.plan([3, 8, 8, 8, 8, 8], rows=2, width=10, members=2)
    np.testing.assert_array_equal(steps, [[[0, -1], [1, -1]], [[2, -1], [3, -1]], [[4, -1], [5, -1]]])


@pytest.mark.parametrize("seen", [1, 5, 11])
def test_resuming_goes_on_where_it_stopped(seen):
    rows = rows_of(LENGTHS[:150])
    stream = lambda **more: packing.packed_batches(rows, batching.supervised, seed=5, epochs=4, **STREAM, **more)  # noqa: E731
    whole = list(stream())
    rest = list(stream(start=whole[seen - 1][1]))
    assert [position for _, position in rest] == [position for _, position in whole[seen:]]
    assert rest[-1][1] == Position(3, len(whole) // 4)
    for (got, _), (expected, _) in zip(rest, whole[seen:], strict=True):
        same(got, expected)
    assert taken(whole[0][0]) != taken(whole[len(whole) // 4][0])  # epochs differ


def test_processes_share_the_rows_of_each_batch():
    rows = rows_of(LENGTHS[:150])
    stream = lambda **more: packing.packed_batches(rows, batching.supervised, epochs=1, **STREAM, **more)  # noqa: E731
    for (expected, _), (left, _), (right, _) in zip(stream(), stream(process=(0, 2)), stream(process=(1, 2))):
        same({name: np.concatenate([left[name], right[name]]) for name in left}, expected)
    with pytest.raises(ValueError, match="process 0 of 3 has no equal share of 4 packed rows"):
        next(stream(process=(0, 3)))
    with pytest.raises(ValueError, match="member 2 has 300 tokens; expected at most width=256"):
        next(packing.packed_batches(rows_of([3, 4, 300]), batching.supervised, **STREAM))
    with pytest.raises(ValueError, match="cannot make 4 rows of 1 members from 0"):
        next(packing.packed_batches([], batching.supervised, members=1, lengths=[], **STREAM))


def test_pairs_count_both_sides():
    pairs, lengths = random_pairs(80, 60, seed=2)
    assert packing.token_counts(pairs).tolist() == lengths.sum(1).tolist()
    stream = packing.packed_batches(pairs, batching.pairs, batch_rows=2, width=128, limit=60, epochs=1)
    steps = [preference.Batch(**batch) for batch, _ in stream]
    sums = [np.count_nonzero(batch.segments, axis=(1, 2, 3)) for batch in steps]
    assert max(map(max, sums)) <= 128 and sum(map(sum, sums)) == lengths.sum()
    assert steps[0].tokens.shape[0] == 2 and steps[0].tokens.shape[2:] == (2, 60)


def test_mismatched_answers_fit_too_and_only_one_left_alone_has_none():
    """Prompts are odd numbers, answers even ones; a row of one member gets an answer of another row."""
    rng = np.random.default_rng(4)
    rows = [
        TokenLabelled(row(*[2 * i + 1] * p, *[2 * i] * a, prompt=p), bool(i % 2))
        for i, (p, a) in enumerate(zip(rng.integers(1, 20, 61), rng.integers(1, 40, 61)))
    ]
    stream = packing.packed_batches(rows, batching.unpaired, batch_rows=3, width=64, limit=60, epochs=1)
    lone = 0
    for batch, _ in islice(stream, 100):
        batch = kto.Batch(**batch)
        assert np.count_nonzero(batch.mismatched_segments, axis=(1, 2)).max() <= 64
        full = batch.weights > 0
        lone += np.sum(full.sum(1) == 1)
        assert batch.mismatched_mask[full].any(-1).all() or full.sum() == 1
        assert not batch.mismatched_segments[~full].any() and not batch.mismatched_mask[~full].any()
        own, other = batch.tokens[full], batch.mismatched_tokens[full]
        np.testing.assert_array_equal(own[:, 0], other[:, 0])  # the same prompt
        answers = other[batch.mismatched_mask[full]]
        assert (answers % 2 == 0).all() and set(answers.tolist()) <= set(own[batch.mask[full]].tolist())
        assert not (np.where(batch.mismatched_mask[full], other, -1) == own[:, :1] - 1).any()  # not its own answer
    assert lone > 0


def test_statistics():
    line = packing.statistics(rows_of([3, 4, 2, 1]), batch_rows=1, width=5, limit=4, batch_size=2, buckets=(2, 4))
    # two rows of 5 hold all 10; the batches are [3, 4] of 4 and [2, 1] of 2; padded, four rows of 4
    expected = "1 packed rows of 5 hold 2.0 members and are 100% full (batches of 2: 83% in buckets, 62% padded to 4)"
    assert line == f"4 members, 10 tokens; {expected}"
    pair = TokenPair(row(1, 2), row(1, 2, 3))
    assert "50% full (batches of 1: 62% in buckets" in packing.statistics(
        [pair], batch_rows=1, width=10, limit=4, batch_size=1, buckets=(4,)
    )
    assert packing.token_counts([TokenPrompt(np.arange(5), "a", {})]).tolist() == [5]
