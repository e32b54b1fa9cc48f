"""What a loss needs beyond log-probabilities, said where the loss is, so that an algorithm computes just that.

A pairwise loss finds its extras in `Response.extra`:

    @needs("win_rate")
    def sppo(chosen, rejected, *, beta=1e-3): ... chosen.extra["win_rate"] ...

An algorithm asks `needed(loss)`. Some extras are computed from the policy (`log_sum_p2`: log sum_v p_v^2 at every
token), some from policy and reference (`forward_kl`: KL(reference || policy) at every token), all others come with the
batch, one number or one row of tokens for each side.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from alignax.types import Array, Response

Loss = TypeVar("Loss", bound=Callable)


def needs(*names: str) -> Callable[[Loss], Loss]:
    """Says which entries of `Response.extra` a loss reads."""

    def mark(loss: Loss) -> Loss:
        loss.needs = names  # pyright: ignore[reportFunctionMemberAccess]
        return loss

    return mark


def needed(loss: Callable) -> tuple[str, ...]:
    """The entries of `Response.extra` that a loss reads, also through `functools.partial` and `functools.wraps`.

    () for most losses.
    """
    return _said(loss, "needs", ())


def whole_batch(loss: Loss) -> Loss:
    """Says that a loss compares the rows of a batch with each other: it takes `weights`, and batches stay whole."""
    loss.whole_batch = True  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def needs_whole_batch(loss: Callable) -> bool:
    """Whether `whole_batch` marks a loss, also through `functools.partial`."""
    return _said(loss, "whole_batch", False)


def without_reference(loss: Loss) -> Loss:
    """Says that a loss looks at no `Response.ref_logp`, so that an algorithm does not ask for a reference."""
    loss.without_reference = True  # pyright: ignore[reportFunctionMemberAccess]
    return loss


def reads_reference(loss: Callable) -> bool:
    """Whether a loss is not marked by `without_reference`, also through `functools.partial`."""
    return not _said(loss, "without_reference", False)


def extra(response: Response, name: str, loss: str) -> Array:
    """One entry of `Response.extra`.

    Raises:
      ValueError: when it is missing.
    """
    if name not in response.extra:
        raise ValueError(f"{loss}: Response.extra holds {sorted(response.extra)}; expected {name!r} among them")
    return response.extra[name]


def _said(loss: Callable, name: str, default: Any) -> Any:
    while not hasattr(loss, name):
        inner = loss.func if isinstance(loss, functools.partial) else getattr(loss, "__wrapped__", None)
        if inner is None:
            return default
        loss = inner
    return getattr(loss, name)
