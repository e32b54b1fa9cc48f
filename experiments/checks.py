"""What every script refuses at once: what would fail after minutes with the folder half written, or mean nothing."""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from alignax import sharding
from alignax.io import hf


def check(config: Any, mesh: jax.sharding.Mesh, *, rows: int, parts: int) -> None:
    """Refuses counts that do not fit each other, or the devices.

    Args:
      config: a script's Config.
      mesh: over whose row axes the parts go.
      rows: of one update's batch, before it is split.
      parts: into how many parts it is split, before each goes over the devices.

    Raises:
      ValueError: for counts below 1, nothing held out, numbers of the optimizer that mean nothing, or rows that do not
        divide.
    """
    for name in ("steps", "evaluate_every", "microbatches"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)}; expected at least 1")
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out={config.held_out}; expected a fraction between 0 and 1, for the evaluation")
    if not 0 < config.learning_rate < math.inf:
        raise ValueError(f"learning_rate={config.learning_rate}; expected a finite number above 0")
    check_ranges(
        config, least={"warmup": 0, "max_grad_norm": 0} | dict.fromkeys({"weight_decay"} & set(vars(config)), 0)
    )
    devices = sharding.row_devices(mesh)
    if rows < 1 or rows % (parts * devices):
        raise ValueError(f"{rows} rows do not divide into {parts} parts on {devices} devices that take rows each")


def check_ranges(config: Any, *, least: Mapping[Any, float], most: Mapping[Any, float] | None = None) -> None:
    """Refuses numbers of a Config that are below or above their bound, or not finite. None, not given, passes.

    Raises:
      ValueError: naming the field, what it is and what was expected.
    """
    given = {name: x for name in {**least, **(most or {})} if (x := getattr(config, name)) is not None}
    for name, bound in least.items():
        if name in given and not given[name] >= bound:  # NaN is not
            raise ValueError(f"{name}={given[name]}; expected {bound} or more")
    for name, bound in (most or {}).items():
        if name in given and not given[name] <= bound:
            raise ValueError(f"{name}={given[name]}; expected {bound} or less")
    for name, value in given.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value}; expected a finite number")


def keywords(function: Callable) -> list[str]:
    """The names of a function's hyperparameters: its keyword-only arguments, but for those that are functions."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not callable(p.default)]


def merge_hyper(
    hyper: Mapping[str, float], flags: Mapping[str, float | None], known: Collection[str], of: str
) -> dict[str, float]:
    """The numbers of `--hyper` and those of flags of their own, of which None says nothing.

    Args:
      hyper: name and number.
      flags: hyperparameter's name and its flag's value.
      known: the names there are.
      of: whose they are, for the message.

    Raises:
      ValueError: for a name that is unknown or given twice, or a number that is not finite.
    """
    flags = {name: value for name, value in flags.items() if value is not None}
    if twice := sorted(flags.keys() & hyper.keys()):
        raise ValueError(f"hyper {twice}: also given by flags of their own; expected one of both")
    given = {**hyper, **flags}
    if unknown := sorted(given.keys() - set(known)):
        expected = f"some of {sorted(known)}" if known else "none"
        raise ValueError(f"hyper {unknown}: unknown to {of}; expected {expected}")
    for name, value in given.items():
        if not math.isfinite(value):
            raise ValueError(f"hyper {name}={value}; expected a finite number")
    return given


def check_context(loaded: hf.Loaded, said: str, length: int, *, of: str = "model") -> None:
    """Refuses rows longer than a network was made for; `said` tells where their length comes from.

    Raises:
      ValueError: with the longest rows there may be.
    """
    most = loaded.model.config.max_positions
    if length > most:
        raise ValueError(f"{said}={length}; expected at most {most}, the {of}'s context")
