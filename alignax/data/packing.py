"""Several short members in one row of the network, so that little of it is padding.

A packed batch is an ordinary batch whose leaves lead with [R, K] instead of [B]: R rows of the network, each with at
most K members (rows, pairs or answers with all they have) whose tokens add up to at most `width`. An empty slot repeats
some member with weight 0 and segments of 0. Nothing is concatenated here: in the compiled step `layouts.bundled` makes
rows of the members, and `layouts.packed(model, width=width, members=K)`, or 2 K for pairs, lets the network see R rows.

The grouping is first-fit decreasing: "Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms",
Johnson, Demers, Ullman, Garey and Graham (https://doi.org/10.1137/0203025).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data import batching
from alignax.data.batching import Batch, Position
from alignax.data.tokens import TokenPrompt, TokenRow

AHEAD = 4  # a step chooses among so many steps' worth of members; with 2, rows of 2 members are up to 6 % emptier


class Packed(NamedTuple):
    """What `pack` gives."""

    batch: Any  # of the type that came in, its leaves [R, K, ...]
    fill: float  # tokens of `segments` for each column of the R rows


def first_fit(lengths: Sequence | np.ndarray, *, width: int, members: int, rows: int | None = None) -> np.ndarray:
    """The members of each row, int [R, K], -1 for an empty slot: the longest first, each into the first row it fits.

    Args:
      lengths: tokens of every member, [B]; or [B, C] of members that enter the network at C places (an answer, and its
        mismatched row), each with R rows of `width` of its own.
      width: tokens of a row.
      members: K, the most members of a row.
      rows: R; None for as many as it takes.

    Raises:
      ValueError: for a member longer than a row, or members that do not fit `rows` rows.
    """
    sizes = _sizes(lengths)
    return _index(_groups(sizes, np.arange(len(sizes)), width=width, rows=rows, members=members), members)


def pack(batch: Any, *, width: int, rows: int | None = None, members: int | None = None) -> Packed:
    """A batch in its packed form, its members in rows of `width` tokens. Members that weigh 0 are left out.

    Args:
      batch: any Batch of `alignax.algorithms`, or a dict of its arrays. All its leaves lead with B, `segments` counts
        the tokens (a pair's are those of both sides), and so does any other array of segments in it (of mismatched or
        degraded rows, of a teacher's), each for rows of its own.
      width: tokens of a row.
      rows: R; None for as many as it takes.
      members: K; None for the members of the fullest row.

    Raises:
      ValueError: for a batch without segments, a leaf without a row for each member, and what `first_fit` refuses.
    """
    arrays = _map(_array, batch)
    fields = arrays if isinstance(arrays, dict) else arrays._asdict()
    if fields.get("segments") is None or not (isinstance(arrays, dict) or "weights" in fields):
        raise ValueError(f"pack: a batch of {sorted(fields)}; expected segments among them, and a place for weights")
    count = len(fields["segments"])
    weights = np.ones(count, np.float32) if fields.get("weights") is None else fields["weights"]
    sizes = np.stack([np.count_nonzero(x.reshape(count, -1), axis=1) for x in _segments(arrays, count)], axis=1)
    groups = _groups(sizes, np.flatnonzero(weights), width=width, rows=rows, members=members or count)
    index = _index(groups, members or max(1, *map(len, groups)))
    chosen = np.where(index < 0, index[:, :1].clip(0), index)
    packed = _map(lambda _, leaf: leaf[chosen], arrays)
    given = {"weights": weights[chosen]}
    packed = packed | given if isinstance(packed, dict) else packed._replace(**given)
    return Packed(_without(packed, index < 0), int(sizes[index[index >= 0], 0].sum()) / (len(index) * width))


def plan(
    lengths: Sequence | np.ndarray,
    *,
    rows: int,
    width: int,
    members: int,
    seed: int | None = None,
    epoch: int = 0,
) -> list[np.ndarray]:
    """An epoch's steps, each int [R, K] as of `first_fit`; `seed=None` takes the members in order.

    A step takes the members that are next and would fill its rows, the longest first, then fills what is left open from
    the members after them. Those without a place come first in the step after.

    Raises ValueError for no members, or one longer than a row.
    """
    sizes = _sizes(lengths)
    _check_sizes(sizes, np.arange(len(sizes)), width)
    if not len(sizes) or rows < 1 or members < 1:
        raise ValueError(f"cannot make {rows} rows of {members} members from {len(sizes)}")
    order = np.arange(len(sizes)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(sizes))
    each = min(rows * members, rows * width / max(sizes.mean(0).max(), 1))
    waiting, ahead = order.tolist(), int(np.ceil(each * AHEAD))
    out = []
    while waiting:
        near, rest = waiting[:ahead], waiting[ahead:]
        due = int(np.searchsorted(np.cumsum(sizes[near].max(1)), rows * width, side="right"))
        due = min(due, rows * members)
        # the one that waits longest goes first, so that none waits for ever
        turn = near[:1] + _decreasing(sizes, near[1:due]) + _decreasing(sizes, near[due:])
        groups, left = _place(sizes, turn, width=width, rows=rows, members=members)
        out.append(_index(groups, members))
        left = set(left)
        waiting = [i for i in near if i in left] + rest
    return out


def packed_batches(
    rows: Sequence,
    collate: Callable[..., Batch],
    *,
    batch_rows: int,
    width: int,
    limit: int,
    members: int | None = None,
    lengths: Sequence | np.ndarray | None = None,
    seed: int | None = 0,
    epochs: int | None = None,
    start: tuple[int, int] = (0, 0),
    pad_id: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Batch, Position]]:
    """Packed batches of one shape, each with the position to resume from after it. An epoch shows each member once.

    How many members an update sees varies a little; its weights say which slots hold one.

    Args:
      rows: the members, as for `batches`.
      collate: of `alignax.data.batching`, or a function of its kind. It is called for one row at a time: `unpaired`
        exchanges the answers of one row, so that the mismatched rows fit too (a member alone gets a neighbour's).
      batch_rows: R, the rows of a batch, over all processes.
      width: tokens of a row.
      limit: columns of a member's arrays: the most tokens of a member, or of one side of a pair.
      members: K; None: `usual_members`.
      lengths: tokens of every member, [B] or [B, C] as for `first_fit`; None: `token_counts`.
      seed, epochs, start, pad_id, process: as for `batches`; the rows of a batch are shared out.

    Raises:
      ValueError: for a member longer than a row, and rows that the processes cannot share.
    """
    index, count = process
    if not 0 <= index < count or batch_rows % count:
        raise ValueError(f"process {index} of {count} has no equal share of {batch_rows} packed rows")
    share = slice(index * batch_rows // count, (index + 1) * batch_rows // count)
    lengths = token_counts(rows) if lengths is None else lengths
    members = usual_members(lengths, width=width) if members is None else members
    epoch, first = start
    while epochs is None or epoch < epochs:
        steps = plan(lengths, rows=batch_rows, width=width, members=members, seed=seed, epoch=epoch)
        for number, step in enumerate(steps[first:], start=first):
            parts = [_collated(rows, step, row, collate, width=limit, pad_id=pad_id) for row in step[share]]
            batch = _map(lambda _, *leaves: np.stack(leaves), *parts)
            yield _without(batch, step[share] < 0), Position(epoch, number + 1)
        epoch, first = epoch + 1, 0


def token_counts(rows: Sequence) -> np.ndarray:
    """The tokens of every member, int [B]: those of all rows it holds, such as both sides of a pair."""
    return np.array([sum(part.length for part in _rows_of(row)) for row in rows], np.int64)


def usual_members(lengths: Sequence | np.ndarray, *, width: int) -> int:
    """K for a stream: twice the members that fill a row on average. First-fit gathers the short ones in few rows."""
    return int(np.ceil(2 * width / max(_sizes(lengths).mean(0).max(), 1)))


def statistics(
    rows: Sequence, *, batch_rows: int, width: int, limit: int, batch_size: int, buckets: Sequence[int]
) -> str:
    """One printable line: members, tokens, how full an epoch's packed rows are, and how full batches would be."""
    lengths = token_counts(rows)
    members = usual_members(lengths, width=width)
    steps = plan(lengths, rows=batch_rows, width=width, members=members)
    packed = lengths.sum() / (len(steps) * batch_rows * width)
    sides = sum(len(list(_rows_of(row))) for row in rows)
    plain = batching.plan([row.length for row in rows], batch_size=batch_size, buckets=buckets)
    bucketed = lengths.sum() * len(rows) / (sum(columns for columns, _ in plain) * batch_size * sides)
    return (
        f"{len(rows)} members, {lengths.sum()} tokens; {batch_rows} packed rows of {width} hold "
        f"{len(rows) / len(steps):.1f} members and are {packed:.0%} full (batches of {batch_size}: {bucketed:.0%} in "
        f"buckets, {lengths.sum() / (sides * limit):.0%} padded to {limit})"
    )


def _sizes(lengths: Sequence | np.ndarray) -> np.ndarray:
    sizes = np.asarray(lengths, np.int64)
    return sizes[:, None] if sizes.ndim == 1 else sizes


def _check_sizes(sizes: np.ndarray, among: np.ndarray, width: int) -> None:
    for i in among[(sizes[among] > width).any(1)]:
        raise ValueError(f"member {i} has {sizes[i].max()} tokens; expected at most width={width}, what a row holds")


def _decreasing(sizes: np.ndarray, among: list[int]) -> list[int]:
    return [among[i] for i in np.argsort(-sizes[among].max(1), kind="stable")] if len(among) else []


def _groups(sizes: np.ndarray, among: np.ndarray, *, width: int, rows: int | None, members: int) -> list[list[int]]:
    """First-fit decreasing of these members into exactly `rows` rows, or as many as it takes, at least one."""
    _check_sizes(sizes, among, width)
    most = max(1, len(among)) if rows is None else rows
    if most < 1 or members < 1:
        raise ValueError(f"rows={rows}, members={members}; expected at least 1 of each")
    groups, left = _place(sizes, _decreasing(sizes, among.tolist()), width=width, rows=most, members=members)
    if left:
        raise ValueError(
            f"{len(left)} of {len(among)} members, {sizes[among].sum(0).max()} tokens in all, find no place in {rows} "
            f"rows of width={width} and at most {members} members: expected more rows, or more members in each"
        )
    return groups if rows is not None else [group for group in groups if group] or groups[:1]


def _place(sizes: np.ndarray, order: Sequence[int], *, width: int, rows: int, members: int):
    """Each member in turn goes into the first row with room for it: the rows, and the members left over."""
    free, taken = np.full((rows, sizes.shape[1]), width), np.zeros(rows, int)
    groups, left, used = [[] for _ in range(rows)], [], 0
    for i in order:
        near = slice(0, used + 1)  # the rows in use and an empty one: the others are as empty as that
        fits = (free[near] >= sizes[i]).all(1) & (taken[near] < members)
        row = int(fits.argmax())
        if not fits[row]:
            left.append(i)
            continue
        free[row] -= sizes[i]
        taken[row] += 1
        groups[row].append(int(i))
        used = max(used, min(row + 1, rows - 1))
    return groups, left


def _index(groups: list[list[int]], members: int) -> np.ndarray:
    return np.array([group + [-1] * (members - len(group)) for group in groups], int)


def _collated(rows: Sequence, step: np.ndarray, row: np.ndarray, collate: Callable[..., Batch], **options) -> Batch:
    """One row's members as a batch of K, the empty slots filled with a member of another row where there is one."""
    own, others = row[row >= 0].tolist(), step[(step >= 0) & ~np.isin(step, row)]
    filler = others[:1].tolist() or own[:1]
    weights = np.arange(len(row)) < (2 if len(own) == 1 and len(others) else len(own))
    chosen = own + filler * (len(row) - len(own))
    return collate([rows[i] for i in chosen], weights.astype(np.float32), **options)


def _without(batch: Any, empty: np.ndarray) -> Any:
    """The packed batch with weights, masks and segments of 0 in its empty slots."""

    def blank(name: str, leaf: np.ndarray) -> np.ndarray:
        if not name.endswith(("weights", "mask", "segments")):
            return leaf
        return np.where(empty.reshape(*empty.shape, *[1] * (leaf.ndim - 2)), np.zeros((), leaf.dtype), leaf)

    return _map(blank, batch)


def _segments(batch: Any, count: int) -> list[np.ndarray]:
    """Every array of segments in a batch, `segments` first; refuses leaves without a row for each member."""
    found = []

    def see(name: str, leaf: np.ndarray) -> None:
        if not leaf.ndim or len(leaf) != count:
            raise ValueError(f"pack: {name} of shape {leaf.shape}; expected {count} rows, as many as of segments")
        if name.endswith("segments"):
            found.append((name != "segments", leaf))

    _map(see, batch)
    return [leaf for _, leaf in sorted(found, key=lambda entry: entry[0])]


def _array(name: str, leaf: Any) -> np.ndarray:
    if isinstance(leaf, list) or not hasattr(leaf, "shape"):
        raise ValueError(f"pack: {name} is a {type(leaf).__name__}; expected an array with a row for each member")
    return np.asarray(leaf)


def _map(fn: Callable, *trees: Any, name: str = "") -> Any:
    """fn(name, *leaves) over dicts and NamedTuples, a field within a field named "outer.inner"; None stays."""
    first, inner = trees[0], name + "." if name else ""
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: _map(fn, *(tree[key] for tree in trees), name=inner + key) for key in first}
    if isinstance(first, tuple):
        fields = type(first)._fields  # pyright: ignore[reportAttributeAccessIssue]
        return type(first)(*(_map(fn, *parts, name=inner + field) for field, *parts in zip(fields, *trees)))
    return fn(name, *trees)


def _rows_of(row: Any) -> Iterator[TokenRow | TokenPrompt]:
    """The rows of tokens that a member is made of, such as the two sides of a pair."""
    if isinstance(row, TokenRow | TokenPrompt):
        yield row
    elif isinstance(row, tuple):
        for part in row:
            yield from _rows_of(part)
