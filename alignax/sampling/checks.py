"""What a sampler refuses, while it is traced: nothing here reaches the device or reads a value that is not known."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from alignax.types import Array, Model, Scalar

# name: dtype, smallest, largest, may it equal the smallest
_RANGES = {
    "temperature": (jnp.float32, 0, np.inf, True),
    "top_k": (jnp.int32, 0, np.inf, True),
    "top_p": (jnp.float32, 0, 1, False),
    "min_p": (jnp.float32, 0, 1, True),
}


def static(*, max_new_tokens: Any, group: Any, eos_ids: Any) -> None:
    """Checks what the compiled program is made for."""
    for name, count in (("max_new_tokens", max_new_tokens), ("group", group)):
        if not _is_int(count):
            raise TypeError(f"generate: {name}={count!r} ({type(count).__name__}); expected a static int")
        if count < 1:
            raise ValueError(f"generate: {name}={count}; expected at least 1")
    if not isinstance(eos_ids, tuple) or not all(_is_int(token) for token in eos_ids):
        raise TypeError(f"generate: eos_ids={eos_ids!r}; expected a tuple of static ints, such as (2,)")
    if any(token < 0 for token in eos_ids):
        raise ValueError(f"generate: eos_ids={eos_ids}; expected ids of at least 0")


def prompts(prompts: Array, lengths: Array, row_ids: Array | None, *, group: int) -> None:
    """Checks shapes and dtypes, and the lengths where they are known."""
    _integers("prompts", prompts)
    if prompts.ndim != 2 or 0 in prompts.shape:
        raise ValueError(f"generate: prompts of shape {prompts.shape}; expected [B, P], neither of them 0")
    batch, width = prompts.shape
    _integers("lengths", lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"generate: lengths of shape {lengths.shape} for {batch} prompts; expected ({batch},)")
    if not isinstance(lengths, Tracer):
        _lengths(np.asarray(lengths), width)
    if row_ids is None:
        return
    _integers("row_ids", row_ids)
    if row_ids.shape != (batch * group,):
        raise ValueError(
            f"generate: row_ids of shape {row_ids.shape} for {batch} prompts in groups of {group}; "
            f"expected ({batch * group},)"
        )


def context(model: Model, width: int, max_new_tokens: int) -> None:
    """Checks that rows fit the model, where it says what does."""
    longest = getattr(model.config, "max_positions", None)  # an adapter's config is the user's own
    if longest is not None and width + max_new_tokens > longest:
        raise ValueError(
            f"generate: prompts of width {width} and max_new_tokens={max_new_tokens} need {width + max_new_tokens} "
            f"positions; expected at most the model's {longest}"
        )


def settings(rows: int, **values: Scalar) -> tuple[Array, ...]:
    """Checks temperature, top_k, top_p and min_p and spreads each over the rows."""
    return tuple(_setting(rows, name, value) for name, value in values.items())


def _setting(rows: int, name: str, value: Scalar) -> Array:
    dtype, smallest, largest, closed = _RANGES[name]
    if np.shape(value) not in ((), (rows,)):
        raise ValueError(f"generate: {name} of shape {np.shape(value)}; expected one number or ({rows},)")
    if dtype == jnp.int32:
        _integers(name, value)
    if not isinstance(value, Tracer):
        known = np.asarray(value, np.float64)
        good = (known <= largest) & (known >= smallest if closed else known > smallest)
        if not np.all(good & np.isfinite(known)):
            expected = f"{'[' if closed else '('}{smallest}, {'infinity)' if largest == np.inf else f'{largest}]'}"
            raise ValueError(f"generate: {name}={value}; expected values in {expected}")
    return jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))


def _lengths(lengths: np.ndarray, width: int) -> None:
    for row in np.flatnonzero((lengths < 1) | (lengths > width))[:1]:
        why = "an empty prompt has nothing to continue (give it a BOS)" if lengths[row] < 1 else "it does not fit"
        raise ValueError(f"generate: lengths[{row}]={lengths[row]}, expected 1 to {width}, the prompts' width: {why}")


def _integers(name: str, value: Scalar) -> None:
    if not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"generate: {name} of dtype {jnp.result_type(value)}; expected integers")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
