"""What a caller may ask of each row, as arrays: one compiled program serves every value."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.sampling import checks
from alignax.types import Array, Scalar


class Settings(NamedTuple):
    """How tokens of a row are chosen and when it ends. Only the widths E, F, K and L are part of a compiled shape."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]
    repetition_penalty: Float[Array, " R"]
    max_tokens: Int[Array, " R"]  # of the completion, EOS included
    eos_ids: Int[Array, "R E"]  # -1: none
    forbidden: Int[Array, "R F"]  # -1: none
    stop: Int[Array, "R K L"]  # sequences of ids that end at L, -1 before them

    @classmethod
    def make(
        cls,
        rows: int,
        *,
        max_new_tokens: int,
        temperature: Scalar = 1.0,
        top_k: Scalar = 0,
        top_p: Scalar = 1.0,
        min_p: Scalar = 0.0,
        repetition_penalty: Scalar = 1.0,
        max_tokens: Scalar | None = None,
        eos_ids: Any = (),
        forbidden: Any = (),
        stop: Any = (),
    ) -> "Settings":
        """Checks what callers give (see `generate`) and spreads it over the rows.

        Raises:
          ValueError: for shapes that do not fit and numbers out of range, where they are known.
          TypeError: for ids or counts that are no integers.
        """
        numbers = checks.numbers(
            rows,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            max_tokens=max_new_tokens if max_tokens is None else max_tokens,
        )
        if max_tokens is not None:
            # the value as it was given: inside of `jit` what `numbers` makes of it is traced
            numbers[-1] = jnp.minimum(numbers[-1], checks.at_most("max_tokens", max_tokens, max_new_tokens))
        ids = (checks.ids(rows, name, value) for name, value in (("eos_ids", eos_ids), ("forbidden", forbidden)))
        return cls(*numbers, *ids, stop=checks.sequences(rows, stop))
