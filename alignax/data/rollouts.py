"""Rollouts on disk: sampled rows with their rewards, one line each, to look at and to learn from again.

    data.rollouts.write("rollouts.parquet", samples, rewards=rewards, prompts=prompts, completions=texts)
    rows = data.rollouts.read("rollouts.parquet", width=samples.tokens.shape[1])
    batch = grpo.Batch(rows.tokens, rows.segments, rows.mask, advantages, rollout_logp=rows.logp)

A line holds prompt, completion (texts or messages), prompt_ids, completion_ids, logp and processed_logp of the
completion's tokens, reward, reward/NAME for each of its parts, truncated, row_id, and columns of the user's own.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from alignax.data import sources
from alignax.data.rows import Row
from alignax.sampling import Samples

PART = "reward/"
NEEDED = ("prompt_ids", "completion_ids", "logp", "reward", "truncated", "row_id")
OPTIONAL = ("prompt", "completion", "processed_logp")
_LISTS = {"prompt_ids": "i", "completion_ids": "i", "logp": "if", "processed_logp": "if"}  # kinds of numpy dtypes
_INT32, _FLOAT32 = np.iinfo(np.int32), float(np.finfo(np.float32).max)  # what lies outside would wrap, or be infinite


class Rollouts(NamedTuple):
    """Training rows as they were sampled, on the host; names and dtypes are those of `alignax.sampling.Samples`."""

    tokens: Int[np.ndarray, "R T"]
    segments: Int[np.ndarray, "R T"]
    mask: Bool[np.ndarray, "R T"]
    logp: Float[np.ndarray, "R T"]
    processed_logp: Float[np.ndarray, "R T"] | None
    lengths: Int[np.ndarray, " R"]
    truncated: Bool[np.ndarray, " R"]
    row_ids: Int[np.ndarray, " R"]
    rewards: Float[np.ndarray, " R"]
    parts: dict[str, np.ndarray]  # name: float32 [R], the summands of the reward
    prompts: list | None
    completions: list | None
    columns: dict[str, list]  # the user's own


def write(
    path: str | Path,
    samples: Samples,
    *,
    rewards: ArrayLike,
    parts: Mapping[str, ArrayLike] | None = None,
    prompts: Sequence[Any] | None = None,
    completions: Sequence[Any] | None = None,
    row_ids: ArrayLike | None = None,
    columns: Mapping[str, Any] | None = None,
) -> None:
    """Writes R samples to a file that appears when it is complete.

    Args:
      path: ends in .parquet or .jsonl; the file must not exist, its folder may not.
      samples: from the sampler, leaves on any device. Padding is not written.
      rewards: `[R]`, kept in float32, as the parts are.
      parts: summands of the reward, name and `[R]`.
      prompts, completions: R texts or lists of messages.
      row_ids: `[R]`, those that were sampled with; 0 to R - 1 when None.
      columns: name and R values that JSON can hold, such as the step or the data's columns.

    Raises:
      ValueError: naming the column and row: another suffix, a file that exists, lengths that differ, names taken,
        numbers that are NaN or infinite, ids below 0 or row ids that are no int32, values that the file cannot hold,
        rows that are not a prompt and a completion behind it.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: unknown kind of file; expected one of {', '.join(_WRITERS)}")
    if path.exists():
        raise ValueError(f"{path}: exists; name a new file, or remove it")
    lines = _own(jax.device_get(samples), rewards, row_ids)
    texts = {"prompt": prompts, "completion": completions}
    lines |= {name: _plain(name, values) for name, values in texts.items() if values is not None}
    lines |= {f"{PART}{name}": _numbers(f"{PART}{name}", values) for name, values in (parts or {}).items()}
    for name, values in (columns or {}).items():
        if name in (*NEEDED, *OPTIONAL) or name.startswith(PART):
            raise ValueError(f"rollouts: a column is named {name!r}, which is taken; rename it")
        lines[name] = _plain(name, values)
    for name, values in lines.items():
        if len(values) != len(samples.tokens):
            raise ValueError(f"rollouts: {name} has {len(values)} values for {len(samples.tokens)} samples")
    with _appearing(path) as partial:
        _WRITERS[path.suffix](partial, lines)


def read(source: str | Path, *, width: int | None = None) -> Rollouts:
    """Reads back what `write` wrote, each number to its last bit.

    Args:
      source: a file, or a folder of them, in the order of their names.
      width: T, to which rows are padded with 0; None: the longest row's. The sampler's own is P + max_new_tokens, and
        one width for all files compiles one program.

    Raises:
      ValueError: naming file and line: columns that are missing, or not those of the first line; lists whose lengths
        differ; what is no number, or none that int32 and float32 hold; a row longer than the width; no rows at all.
        FileNotFoundError: no such file.
    """
    rows = [_checked(row) for row in sources.read(source)]
    if not rows:
        raise ValueError(f"{source}: no rows")
    first = rows[0]
    for row in rows:
        if row.fields.keys() != first.fields.keys():
            own, others = sorted(row.fields), sorted(first.fields)
            raise ValueError(f"{row.where}: columns {own}; expected those of {first.where}, {others}")
    fields = {name: [row.fields[name] for row in rows] for name in first.fields}
    starts, lengths = (np.array(list(map(len, fields[name])), np.int32) for name in ("prompt_ids", "completion_ids"))
    ends = starts + lengths
    width = int(ends.max()) if width is None else width
    if ends.max() > width:
        raise ValueError(f"{rows[ends.argmax()].where}: {ends.max()} tokens; expected at most the width {width}")
    columns = np.arange(width)
    prompt, filled = columns < starts[:, None], columns < ends[:, None]
    mask = filled & ~prompt

    def spread(name: str, dtype: Any, where: np.ndarray) -> np.ndarray:
        out = np.zeros(mask.shape, dtype)
        out[where] = np.concatenate(fields[name])
        return out

    return Rollouts(
        tokens=spread("prompt_ids", np.int32, prompt) + spread("completion_ids", np.int32, mask),
        segments=filled.astype(np.int32),
        mask=mask,
        logp=spread("logp", np.float32, mask),
        processed_logp=spread("processed_logp", np.float32, mask) if "processed_logp" in fields else None,
        lengths=lengths,
        truncated=np.array(fields["truncated"], bool),
        row_ids=np.array(fields["row_id"], np.int32),
        rewards=np.array(fields["reward"], np.float32),
        parts={n.removeprefix(PART): np.array(x, np.float32) for n, x in fields.items() if n.startswith(PART)},
        prompts=fields.get("prompt"),
        completions=fields.get("completion"),
        columns={n: x for n, x in fields.items() if n not in (*NEEDED, *OPTIONAL) and not n.startswith(PART)},
    )


def _own(samples: Samples, rewards: ArrayLike, row_ids: ArrayLike | None) -> dict[str, list]:
    """The columns that every file has, as lists."""
    tokens, segments, mask = (np.asarray(x) for x in samples[:3])
    rows, columns = len(tokens), np.arange(tokens.shape[1])
    ends = (segments != 0).sum(axis=1)
    starts = ends - mask.sum(axis=1)
    filled = columns < ends[:, None]
    fits = np.all((segments == filled) & (mask == (filled & (columns >= starts[:, None]))), axis=1)
    for row in np.flatnonzero(~fits | (starts < 1) | (starts == ends))[:1]:
        raise ValueError(f"rollouts: row {row} is not [prompt][completion][padding] with the mask on its completion")
    for row, column in np.argwhere(filled & (tokens < 0))[:1]:
        raise ValueError(f"rollouts: tokens[{row}, {column}] is {tokens[row, column]}; expected ids of at least 0")
    own: dict[str, list] = {
        "prompt_ids": [x[:start].tolist() for x, start in zip(tokens, starts)],
        "completion_ids": [x[start:end].tolist() for x, start, end in zip(tokens, starts, ends)],
    }
    for name in ("logp", "processed_logp"):
        values = getattr(samples, name)
        if values is not None:
            if np.shape(values) != mask.shape:
                raise ValueError(
                    f"rollouts: {name} of shape {np.shape(values)}; expected {mask.shape}, as the mask has"
                )
            values = np.where(mask, values, 0.0).astype(np.float32)
            _finite(name, values)
            own[name] = [x[start:end].tolist() for x, start, end in zip(values, starts, ends)]
    own |= {"reward": _numbers("reward", rewards), "truncated": np.asarray(samples.truncated, bool).tolist()}
    return own | {"row_id": list(range(rows)) if row_ids is None else _row_ids(np.asarray(row_ids))}


def _row_ids(found: np.ndarray) -> list[int]:
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"rollouts: row_ids of shape {found.shape} and dtype {found.dtype}; expected R integers")
    for at in np.flatnonzero((found < _INT32.min) | (found > _INT32.max))[:1]:
        raise ValueError(f"rollouts: row_ids[{at}] is {found[at]}; expected an int32")
    return found.tolist()


def _numbers(name: str, values: ArrayLike) -> list[float]:
    with np.errstate(over="ignore"):  # it becomes infinite, and is refused
        found = np.asarray(values, np.float32)
    if found.ndim != 1:
        raise ValueError(f"rollouts: {name} of shape {found.shape}; expected a number for each sample")
    _finite(name, found)
    return found.tolist()


def _finite(name: str, values: np.ndarray) -> None:
    for at in np.argwhere(~np.isfinite(values))[:1]:
        raise ValueError(f"rollouts: {name}{at.tolist()} is {values[tuple(at)]}; expected finite numbers")


def _plain(name: str, values: Any) -> list:
    """A column of texts or a user's own, as what JSON holds."""
    found = values.tolist() if hasattr(values, "tolist") else list(values)
    found = [value.tolist() if hasattr(value, "tolist") else value for value in found]
    try:
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # half a surrogate pair is no UTF-8
    except (TypeError, ValueError) as error:
        raise ValueError(f"rollouts: column {name!r} holds what JSON does not: {error}") from None
    return found


def _checked(row: Row) -> Row:
    """The line of a file, with arrays for lists of numbers."""
    where, fields = row
    if missing := [name for name in NEEDED if name not in fields]:
        raise ValueError(
            f"{where}: no {missing} among its columns {sorted(fields)}; expected what rollouts.write wrote"
        )
    lists = {name: _list_of(where, name, fields[name], kinds) for name, kinds in _LISTS.items() if name in fields}
    sizes = {name: len(value) for name, value in lists.items() if name != "prompt_ids"}
    if not len(lists["prompt_ids"]) or len(set(sizes.values())) > 1:
        sizes = {"prompt_ids": len(lists["prompt_ids"])} | sizes
        raise ValueError(f"{where}: lengths {sizes}; expected a prompt, and a number for each token of the completion")
    for name in ["reward", *(name for name in fields if name.startswith(PART))]:
        if not isinstance(fields[name], float | int) or not -_FLOAT32 <= fields[name] <= _FLOAT32:
            raise ValueError(f"{where}: {name}={fields[name]!r}; expected a finite number")
    if not isinstance(fields["truncated"], bool):
        raise ValueError(f"{where}: truncated={fields['truncated']!r}; expected bool")
    row_id = fields["row_id"]
    if not isinstance(row_id, int) or isinstance(row_id, bool) or not _INT32.min <= row_id <= _INT32.max:
        raise ValueError(f"{where}: row_id={row_id!r}; expected int32")
    return Row(where, fields | lists)


def _list_of(where: str, name: str, values: Any, kinds: str) -> np.ndarray:
    try:
        found = np.asarray(values)
    except ValueError:  # lists of unequal length
        found = np.array(None)
    least, largest = (0, _INT32.max) if kinds == "i" else (-_FLOAT32, _FLOAT32)
    good = found.ndim == 1 and (not found.size or found.dtype.kind in kinds)
    if not good or not np.all((found >= least) & (found <= largest)):  # NaN is neither
        raise ValueError(
            f"{where}: {name}={values!r}; expected a list of {'ids' if kinds == 'i' else 'finite numbers'}"
        )
    return found


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A hidden sibling, which no reader of folders opens, that becomes the file when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_jsonl(path: Path, lines: Mapping[str, list]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for values in zip(*lines.values()):
            file.write(json.dumps(dict(zip(lines, values)), ensure_ascii=False, allow_nan=False) + "\n")


def _write_parquet(path: Path, lines: Mapping[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.lib
    import pyarrow.parquet

    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    types = {"prompt_ids": ids, "completion_ids": ids, "logp": numbers, "processed_logp": numbers}
    types |= {name: pa.float32() for name in lines if name == "reward" or name.startswith(PART)}
    arrays = {}
    for name, values in lines.items():
        try:
            arrays[name] = pa.array(values, types.get(name))
        except (pyarrow.lib.ArrowException, OverflowError) as error:
            raise ValueError(f"rollouts: column {name!r} is not of one type, which Parquet needs: {error}") from None
    try:
        pyarrow.parquet.write_table(pa.table(arrays), path)
    except pyarrow.lib.ArrowNotImplementedError as error:  # objects without fields
        raise ValueError(f"rollouts: Parquet does not hold these columns: {error}") from None


_WRITERS: dict[str, Callable[[Path, Mapping[str, list]], None]] = {".parquet": _write_parquet, ".jsonl": _write_jsonl}
