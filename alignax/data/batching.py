"""Batches of a few fixed widths, in an order that depends only on the seed and the epoch.

A row goes to the narrowest bucket it fits and a batch holds rows of one bucket, so there are as many compiled shapes as
buckets. What an epoch leaves over in a bucket moves on to the next wider one, and the last batch is filled with rows
that weigh 0: every batch has its full size, and an epoch shows each row once.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data.tokens import TokenLabelled, TokenPair, TokenPrompt, TokenRow

Batch = dict[str, Any]


class Position(NamedTuple):
    """Where an iteration stands: next is batch number `batch` of epoch `epoch`. Two ints to save and resume by."""

    epoch: int = 0
    batch: int = 0


def supervised(rows: Sequence[TokenRow], weights: np.ndarray, *, width: int, pad_id: int = 0) -> Batch:
    """tokens, segments int32 [B, T] and mask bool [B, T], padded to `width`; weights float32 [B].

    Rows that weigh 0 keep their tokens (attention over nothing is not defined) and lose their mask.
    """
    return {
        "tokens": _pad([row.tokens for row in rows], width, pad_id),
        "segments": _pad([np.ones(row.length, np.int32) for row in rows], width, 0),
        "mask": _pad([row.mask for row in rows], width, False) & (weights > 0)[:, None],
        "weights": weights,
    }


def pairs(rows: Sequence[TokenPair], weights: np.ndarray, *, width: int, pad_id: int = 0) -> Batch:
    """The arrays of `supervised` as [B, 2, T], chosen before rejected; weights float32 [B]."""
    sides = [side for row in rows for side in row]
    flat = supervised(sides, np.repeat(weights, 2), width=width, pad_id=pad_id)
    return {k: flat[k].reshape(len(rows), 2, width) for k in ("tokens", "segments", "mask")} | {"weights": weights}


def labelled(rows: Sequence[TokenLabelled], weights: np.ndarray, *, width: int, pad_id: int = 0) -> Batch:
    """The arrays of `supervised`, and desirable bool [B]."""
    arrays = supervised([row.row for row in rows], weights, width=width, pad_id=pad_id)
    return arrays | {"desirable": np.array([row.desirable for row in rows], bool)}


def unpaired(rows: Sequence[TokenLabelled], weights: np.ndarray, *, width: int, pad_id: int = 0) -> Batch:
    """The arrays of `labelled`, and mismatched_tokens, ..._segments, ..._mask: prompt i with another row's completion.

    It is that of the row before, going round the rows that weigh something; what is over the width is cut off its end.
    The only such row of a batch (the last of an epoch may have one) has no other: its mismatched mask is empty.

    Raises:
      ValueError: for a batch of one row, which never has another.
    """
    if len(rows) < 2:
        raise ValueError(
            "unpaired: a batch of one row; expected at least 2: KTO pairs each prompt with the completion of another "
            "row, and here the mismatched row would be the row itself"
        )
    counted = np.flatnonzero(weights > 0)
    before = dict(zip(counted.tolist(), np.roll(counted, 1).tolist()))
    others = [_exchanged(row.row, rows[before.get(i, i)].row, width) for i, row in enumerate(rows)]
    alone = weights if len(counted) > 1 else np.zeros_like(weights)
    mismatched = supervised(others, alone, width=width, pad_id=pad_id)
    arrays = labelled(rows, weights, width=width, pad_id=pad_id)
    return arrays | {f"mismatched_{name}": mismatched[name] for name in ("tokens", "segments", "mask")}


def prompts(rows: Sequence[TokenPrompt], weights: np.ndarray, *, width: int, pad_id: int = 0) -> Batch:
    """tokens int32 [B, P], lengths int32 [B], weights float32 [B]; prompts and columns, lists of B, for the reward."""
    return {
        "tokens": _pad([row.tokens for row in rows], width, pad_id),
        "lengths": np.array([row.length for row in rows], np.int32),
        "weights": weights,
        "prompts": [row.prompt for row in rows],
        "columns": [row.columns for row in rows],
    }


def plan(
    lengths: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int | None = None,
    epoch: int = 0,
) -> list[tuple[int, list[int]]]:
    """An epoch's batches as (width, row numbers), all full but the last; `seed=None` keeps the rows in order.

    Raises ValueError for no rows, and for a row that no bucket holds.
    """
    sizes, widths = np.asarray(lengths, np.int64), sorted(set(buckets))
    if batch_size < 1 or not len(sizes):
        raise ValueError(f"cannot make batches of {batch_size} from {len(sizes)} rows")
    if not widths or sizes.max() > widths[-1]:
        raise ValueError(f"row {sizes.argmax()} has {sizes.max()} tokens, more than the buckets {widths} hold")
    order = np.arange(len(sizes)) if seed is None else np.random.default_rng((seed, epoch)).permutation(len(sizes))
    waiting: dict[int, list[int]] = {width: [] for width in widths}
    out = []
    for number in order.tolist():
        width = widths[np.searchsorted(widths, sizes[number])]
        waiting[width].append(number)
        if len(waiting[width]) == batch_size:
            out.append((width, waiting[width]))
            waiting[width] = []
    left: list[int] = []
    for width in widths:
        left += waiting[width]
        if len(left) >= batch_size:
            out.append((width, left[:batch_size]))
            left = left[batch_size:]
    if left:
        out.append((widths[np.searchsorted(widths, sizes[left].max())], left))
    return out


def batches(
    rows: Sequence,
    collate: Callable[..., Batch],
    *,
    batch_size: int,
    buckets: Sequence[int],
    seed: int | None = 0,
    epochs: int | None = None,
    start: tuple[int, int] = (0, 0),
    pad_id: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Batch, Position]]:
    """Batches, each with the position to resume from after it.

    Args:
      rows: `TokenRow`s, `TokenPair`s, `TokenLabelled`s or `TokenPrompt`s.
      collate: `supervised`, `pairs`, `labelled`, `unpaired` or `prompts`.
      batch_size: the rows of a batch, over all processes.
      buckets: the widths a batch may have.
      seed: of the order; None keeps the rows in order.
      epochs: the epoch to end before; None goes on for ever.
      start: the position that came with the last batch seen.
      pad_id: fills rows up to the width. Any token will do, EOS too: nothing is read off it.
      process: (index, count): this process gets its equal share of each batch; all have the same width.
    """
    index, count = process
    if not 0 <= index < count or batch_size % count:
        raise ValueError(f"process {index} of {count} has no equal share of {batch_size} rows")
    share = slice(index * batch_size // count, (index + 1) * batch_size // count)
    lengths = [row.length for row in rows]
    epoch, first = start
    while epochs is None or epoch < epochs:
        epoch_plan = plan(lengths, batch_size=batch_size, buckets=buckets, seed=seed, epoch=epoch)
        for number, (width, chosen) in enumerate(epoch_plan[first:], start=first):
            weights = (np.arange(batch_size) < len(chosen)).astype(np.float32)
            filled = [rows[i] for i in chosen + chosen[:1] * (batch_size - len(chosen))]
            yield collate(filled[share], weights[share], width=width, pad_id=pad_id), Position(epoch, number + 1)
        epoch, first = epoch + 1, 0


def statistics(rows: Sequence, *, batch_size: int, buckets: Sequence[int]) -> str:
    """One printable line: rows, tokens, how many are trained on, and how full the batches are."""
    lengths = [row.length for row in rows]
    slots = sum(width for width, _ in plan(lengths, batch_size=batch_size, buckets=buckets)) * batch_size
    rows = [row.row if isinstance(row, TokenLabelled) else row for row in rows]
    sides = [side for row in rows for side in (row if isinstance(row, TokenPair) else [row])]
    tokens = sum(side.length for side in sides)
    trained = sum(int(side.mask.sum()) for side in sides if isinstance(side, TokenRow))
    fill = tokens / (slots * len(sides) / len(rows))
    return f"{len(rows)} rows, {tokens} tokens, {trained} trained on; batches {fill:.0%} full"


def _exchanged(row: TokenRow, other: TokenRow, width: int) -> TokenRow:
    """The prompt of a row with the completion of another, at most `width` tokens."""
    prompt, start = row.tokens[: int(np.argmax(row.mask))], int(np.argmax(other.mask))
    mask = np.concatenate([np.zeros(len(prompt), bool), other.mask[start:]])
    return TokenRow(np.concatenate([prompt, other.tokens[start:]])[:width], mask[:width])


def _pad(arrays: Sequence[np.ndarray], width: int, value: Any) -> np.ndarray:
    out = np.full((len(arrays), width), value, arrays[0].dtype)
    for row, array in zip(out, arrays):
        row[: len(array)] = array
    return out
