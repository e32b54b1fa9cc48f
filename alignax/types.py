"""The few shapes everything agrees on: a mean not yet divided, a model as a few functions, a loss function.

Importing this module touches no device. Array axes, everywhere in the library: `B` rows, `T` tokens of a row, `D`
model width, `V` vocabulary, `G` samples of one prompt.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

Array = jax.Array
Params = Any  # a pytree of arrays; for the shipped models nested dicts
Cache = Any  # its layout is the model's own business
Scalar = float | int | Array  # a hyperparameter: a Python number or a traced array

LEAST_LOGP = -1e4  # what a log-probability counts for at least: a token of probability 0 must turn no loss into NaN


class Mean(NamedTuple):
    """A mean not yet divided. Parts from micro-batches, devices and processes add up field by field, exactly."""

    total: Array  # float32 []
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # float32 []

    def value(self) -> Array:
        """total / count, and 0 (with a zero gradient) where nothing was counted."""
        safe = jnp.where(self.count == 0, 1.0, self.count)
        return jnp.where(self.count == 0, 0.0, self.total / safe)


class Max(NamedTuple):
    """A maximum over micro-batches, devices and processes: for metrics such as the largest ratio."""

    largest: Array  # float32 []

    def value(self) -> Array:
        """The maximum itself."""
        return self.largest


class Term(NamedTuple):
    """One summand of a loss: `weight * mean.total / mean.count`, the count taken over the whole batch."""

    weight: Scalar
    mean: Mean


class Hidden(NamedTuple):
    """What a model's body returns: final states before the head, the cache (None without one), auxiliary losses.

    `at [B, T]` is for bodies that run several rows as one (`alignax.layouts`): which of the M states of its bundle is
    that of a token. `states` are then `[R, M, D]`, and bundle r is B / R rows that follow one another. None: its own.
    """

    states: Float[Array, "B T D"]
    cache: Cache
    aux: dict[str, Array]
    at: Int[Array, "B T"] | None = None


class Model(NamedTuple):
    """A language model as pure functions. Nothing outside `alignax.models` knows more about a network than this.

    init: `(key) -> params`.
    hidden: `(params, tokens [B, T], segments [B, T], *, positions=None, parents=None, cache=None, key=None) -> Hidden`.
      Token i sees j <= i of the same segment (0 is padding) or of its parent segment. With a cache, `positions [B, T]`
      also name the cache slots the tokens are written to (None: slots 0 to T - 1, a prefill), and token i sees every
      slot up to its own position.
    logits: `(params, states [..., D]) -> [..., V]`, float32.
    init_cache: `(batch, length) -> cache`, empty.
    config: what saving, planning and FLOP counts need; its `max_positions` is the longest row; None in most adapters.
    values: `(params, states [..., D]) -> [...]`, float32: one number per state, for reward models and critics; None
      without a scalar head (`alignax.models.with_score` gives a model one).
    fork: `(cache, lengths [B], group, slots) -> cache` of B * group rows. The rows of a prompt share what its first
      `lengths` slots hold, and each goes on in `slots` of its own, addressed by the same positions. Leaves lead with B
      (what is shared) or with B * group. None: the sampler repeats the cache.
    unroll: `(params) -> params` that decoding reads faster; `hidden` and `logits` take both. None: nothing to gain.
    rooms: `(tokens) -> (..., tokens)`, the sizes through which the own slots of a forked cache best grow; None: no such
      steps, all slots from the start. resize: `(cache, slots) -> cache`, a forked cache with other own slots.
    """

    init: Callable[..., Params]
    hidden: Callable[..., Hidden]
    logits: Callable[[Params, Array], Array]
    init_cache: Callable[[int, int], Cache]
    config: Any = None
    values: Callable[[Params, Array], Array] | None = None
    fork: Callable[[Cache, Array, int, int], Cache] | None = None
    unroll: Callable[[Params], Params] | None = None
    rooms: Callable[[int], tuple[int, ...]] | None = None
    resize: Callable[[Cache, int], Cache] | None = None


class Response(NamedTuple):
    """One side of a pair, or an unpaired answer, as log-probabilities aligned with its tokens.

    logp, ref_logp: log-probabilities under the policy and the frozen reference (None for reference-free losses).
    mask: which tokens are the response's own. extra: what single losses need beyond that (see their docstrings).
    """

    logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    mask: Array  # [B, T]
    extra: dict[str, Array] = {}  # noqa: RUF012  (never written to)

    @property
    def sum(self) -> Float[Array, " B"]:
        """log p(response | prompt): the sum over the response's tokens."""
        return _masked_sum(self.logp, self.mask)

    @property
    def ref_sum(self) -> Float[Array, " B"]:
        """The same under the reference, a constant to differentiation; zeros when there is no reference."""
        if self.ref_logp is None:
            return jnp.zeros(self.logp.shape[:-1], jnp.float32)
        return jax.lax.stop_gradient(_masked_sum(self.ref_logp, self.mask))

    @property
    def length(self) -> Float[Array, " B"]:
        """The number of response tokens."""
        return jnp.sum((self.mask != 0).astype(jnp.float32), axis=-1)

    @property
    def mean(self) -> Float[Array, " B"]:
        """The average log-probability of a response token, 0 for an empty response."""
        return self.sum / jnp.maximum(self.length, 1.0)


LossFn = Callable[[Params, Any, Any, dict[str, Scalar]], tuple[dict[str, Term], Mapping[str, Mean | Max]]]


def _masked_sum(x: Array, mask: Array) -> Array:
    # `where`, not a product: a NaN or an infinity under the mask must reach neither the value nor the gradient. The
    # floor keeps a token of probability 0 from turning the row's loss and gradient into NaN.
    x = jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0)
    return jnp.sum(jnp.maximum(x, LEAST_LOGP), axis=-1)
