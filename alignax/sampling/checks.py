"""What a sampler refuses, while it is traced: nothing here reaches the device or reads a value that is not known."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from alignax.types import Array, Model, Scalar

_LARGEST = np.iinfo(np.int32).max
# name: dtype, smallest, largest, may it equal the smallest
_RANGES = {
    "temperature": (jnp.float32, 0, np.inf, True),
    "top_k": (jnp.int32, 0, _LARGEST, True),
    "top_p": (jnp.float32, 0, 1, False),
    "min_p": (jnp.float32, 0, 1, True),
    "repetition_penalty": (jnp.float32, 0, np.inf, False),
    "max_tokens": (jnp.int32, 1, _LARGEST, True),
    "length_penalty": (jnp.float32, -np.inf, np.inf, False),
}


def static(**counts: Any) -> None:
    """Checks the counts that the compiled program is made for."""
    for name, count in counts.items():
        if not _is_int(count):
            raise TypeError(f"sampling: {name}={count!r} ({type(count).__name__}); expected a static int")
        if count < 1:
            raise ValueError(f"sampling: {name}={count}; expected at least 1")


def prompts(prompts: Any, lengths: Any, row_ids: Any, *, group: int) -> None:
    """Checks shapes and dtypes, and the lengths where they are known."""
    _integers("prompts", prompts)
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"sampling: prompts of shape {prompts.shape}; expected [B, P], neither of them 0")
    batch, width = prompts.shape
    _integers("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"sampling: lengths of shape {lengths.shape} for {batch} prompts; expected ({batch},)")
    if not isinstance(lengths, Tracer):
        _lengths(np.asarray(lengths), width)
    if row_ids is None:
        return
    _integers("row_ids", row_ids)
    if row_ids.shape != (batch * group,):
        raise ValueError(
            f"sampling: row_ids of shape {row_ids.shape} for {batch} prompts in groups of {group}; "
            f"expected ({batch * group},)"
        )
    if row_ids.dtype.itemsize > 4 and not isinstance(row_ids, Tracer):
        known = np.asarray(row_ids)  # of hashes, say: cut to 32 bits two of them could become one
        for row in np.flatnonzero((known > _LARGEST) | (known < -_LARGEST - 1))[:1]:
            raise ValueError(f"sampling: row_ids[{row}]={known[row]}; expected an int32")


def context(model: Model, width: int, max_new_tokens: int) -> None:
    """Checks that rows fit the model, where it says what does."""
    longest = getattr(model.config, "max_positions", None)  # an adapter's config is the user's own
    if longest is not None and width + max_new_tokens > longest:
        raise ValueError(
            f"sampling: prompts of width {width} and max_new_tokens={max_new_tokens} need {width + max_new_tokens} "
            f"positions; expected at most the model's {longest}"
        )


def vocabulary(model: Model, prompts: Any, lengths: Any) -> None:
    """Checks that ids are known to the model, where they are known here and it says which it knows."""
    size = getattr(model.config, "vocab_size", None)
    if size is None or isinstance(prompts, Tracer) or isinstance(lengths, Tracer):
        return
    ids = np.asarray(prompts)
    inside = np.arange(ids.shape[1])[None] < np.asarray(lengths)[:, None]
    for row, column in np.argwhere(inside & ((ids < 0) | (ids >= size)))[:1]:
        raise ValueError(f"sampling: prompts[{row}, {column}]={ids[row, column]}; expected ids of 0 to {size - 1}")


def numbers(rows: int, **values: Scalar) -> list[Array]:
    """Checks numbers by name, and spreads each over the rows."""
    return [_number(rows, name, value) for name, value in values.items()]


def at_most(name: str, value: Scalar, largest: int) -> Array:
    """The value, cut at `largest` where it is traced; refused above it where it is known."""
    if not isinstance(value, Tracer) and np.any(np.asarray(value) > largest):
        raise ValueError(f"sampling: {name}={value}; expected at most max_new_tokens={largest}")
    return jnp.minimum(value, largest)


def ids(rows: int, name: str, value: Any) -> Int[Array, "R N"]:
    """Token ids for each row from a sequence of ints for all rows, or an array [N] or [R, N] with -1 for none."""
    value = _ids(name, value)
    if value.ndim not in (1, 2) or (value.ndim == 2 and value.shape[0] != rows):
        raise ValueError(f"sampling: {name} of shape {value.shape}; expected [N] or [{rows}, N]")
    return jnp.broadcast_to(value, (rows, value.shape[-1]))


def sequences(rows: int, value: Any) -> Int[Array, "R K L"]:
    """Sequences of ids for each row, -1 before those shorter than the longest.

    value: sequences of ints for all rows, or an array [K, L] or [R, K, L] that has this form.
    """
    if not hasattr(value, "ndim"):
        value = padded(value)
    if value.ndim not in (2, 3) or (value.ndim == 3 and value.shape[0] != rows):
        raise ValueError(f"sampling: stop of shape {value.shape}; expected [K, L] or [{rows}, K, L]")
    if value.shape[-2] and not value.shape[-1]:
        raise ValueError(f"sampling: stop of shape {value.shape}; expected sequences of at least one id")
    if not isinstance(value, Tracer) and value.size:
        known = np.asarray(value)
        if np.any((known[..., 1:] < 0) & (known[..., :-1] >= 0)):
            raise ValueError("sampling: stop has -1 behind an id; expected -1 only before each sequence")
    return jnp.broadcast_to(_ids("stop", value), (rows, *value.shape[-2:]))


def padded(found: Any) -> Any:
    """Sequences as one array [K, L], -1 before those shorter than the longest."""
    if not all(isinstance(x, Sequence) and len(x) and _are_ints(x) for x in found):
        raise TypeError(f"sampling: stop={found!r}; expected sequences of ids, none of them empty, such as ((13, 13),)")
    traced = any(isinstance(token, Tracer) for x in found for token in x)
    if not traced and any(token < 0 for x in found for token in x):
        raise ValueError(f"sampling: stop={found!r}; expected ids of at least 0")
    if not traced:
        _int32("stop", [token for x in found for token in x])
    length = max(map(len, found), default=1)
    rows = [[-1] * (length - len(x)) + list(x) for x in found]
    return jnp.array(rows, jnp.int32) if traced else np.array(rows, np.int32).reshape(len(found), length)


def _ids(name: str, value: Any) -> Array:
    least = -1
    if not hasattr(value, "ndim"):
        if not isinstance(value, Sequence) or not _are_ints(value):
            raise TypeError(f"sampling: {name}={value!r}; expected ints, such as (2,)")
        traced = any(isinstance(x, Tracer) for x in value)  # a tuple that was handed through `jit`
        if not traced:
            _int32(name, value)
        value, least = jnp.stack(value) if traced else np.asarray(value, np.int32), 0
    _integers(name, value)
    if not isinstance(value, Tracer):
        if np.any(np.asarray(value) < least):
            raise ValueError(f"sampling: {name}={value}; expected ids of at least {least}")
        _int32(name, value)
    return jnp.asarray(value, jnp.int32)


def _int32(name: str, value: Any) -> None:
    """Refuses what would wrap, or raise an error that does not say where."""
    known = np.asarray(value) if hasattr(value, "ndim") else np.array(value, object)
    if np.any(known > _LARGEST):
        raise ValueError(f"sampling: {name}={value}; expected ids of at most {_LARGEST}")


def _number(rows: int, name: str, value: Scalar) -> Array:
    dtype, smallest, largest, closed = _RANGES[name]
    if np.shape(value) not in ((), (rows,)):
        raise ValueError(f"sampling: {name} of shape {np.shape(value)}; expected one number or ({rows},)")
    if dtype == jnp.int32:
        _integers(name, value)
    if not isinstance(value, Tracer):
        known = np.asarray(value, np.float64)
        if dtype == jnp.float32:
            with np.errstate(over="ignore", under="ignore"):
                known = known.astype(dtype)  # as it will be used: 1e-50 is 0, 1e39 infinite
        good = (known <= largest) & (known >= smallest if closed else known > smallest)
        if not np.all(good & np.isfinite(known)):
            expected = f"{'[' if closed else '('}{smallest}, {'infinity)' if largest == np.inf else f'{largest}]'}"
            raise ValueError(f"sampling: {name}={value}; expected values in {expected}, {np.dtype(dtype)}")
    return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))


def _lengths(lengths: np.ndarray, width: int) -> None:
    for row in np.flatnonzero((lengths < 1) | (lengths > width))[:1]:
        why = "an empty prompt has nothing to continue (give it a BOS)" if lengths[row] < 1 else "it does not fit"
        raise ValueError(f"sampling: lengths[{row}]={lengths[row]}, expected 1 to {width}, the prompts' width: {why}")


def _integers(name: str, value: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"sampling: {name} of dtype {jnp.result_type(value)}; expected integers")


def _are_ints(values: Sequence) -> bool:
    return all(_is_int(x) or isinstance(x, Tracer) for x in values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
