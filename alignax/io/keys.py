"""One value of a config.json at a time: read with its type, refused by its name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from alignax.models import gelu, gelu_tanh

Values = Mapping[str, Any]

# transformers' names; several are the same function to float32 rounding.
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "relu": jax.nn.relu,
}


def positive(values: Values, key: str, default: Any = None, *, kind: type = int) -> Any:
    """A positive int or float; `default` for an absent key or null.

    Raises:
      ValueError: for anything else, or when there is no default either.
    """
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"config.json: {key!r} is missing; expected a positive {kind.__name__}")
    if isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0:
        raise ValueError(f"config.json: {key} is {value!r}; expected a positive {kind.__name__}")
    return kind(value)


def whole(values: Values, key: str) -> int:
    """An int from 0.

    Raises:
      ValueError: for anything else.
    """
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"config.json: {key} is {value!r}; expected an int from 0")
    return value


def listed(values: Values, key: str, length: int) -> list[Any] | None:
    """A list with an entry for each layer; None for an absent key or null.

    Raises:
      ValueError: for anything else.
    """
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise ValueError(f"config.json: {key} is {value!r}; expected a list")
    if len(value) != length:
        raise ValueError(f"config.json: {key} has {len(value)} entries; the model has {length} layers")
    return list(value)


def optional(values: Values, key: str, *, kind: type = float) -> Any:
    """The same, but None for an absent key or null."""
    return None if values.get(key) is None else positive(values, key, kind=kind)


def flag(values: Values, key: str) -> bool:
    """True or false; false for an absent key.

    Raises:
      ValueError: for anything else.
    """
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; expected true or false")
    return value


def activation(values: Values, key: str) -> Callable[[jax.Array], jax.Array]:
    """The function that transformers has under this name.

    Raises:
      ValueError: for a name that is not in `ACTIVATIONS`.
    """
    name = values.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config.json: {key} is {name!r}; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def read_field(values: Values, key: str, expected: Any) -> Any:
    """The value of a `TransformerConfig` field of type `expected` from its key."""
    if expected is bool:
        return flag(values, key)
    if expected in (int, float):
        return positive(values, key, kind=expected)
    return optional(values, key) if expected == float | None else activation(values, key)


def write_field(value: Any, usual: Any) -> Any:
    """A field's value as it stands in config.json. usual: the name an activation should have, where it has several."""
    if callable(value):
        names = [name for name, function in ACTIVATIONS.items() if function is value]
        if not names:
            raise ValueError(f"activation {value!r} has no name in config.json; named: {', '.join(ACTIVATIONS)}")
        return usual if usual in names else names[0]
    # transformers is strict: 256.0 is refused where it expects an int.
    return int(value) if isinstance(usual, int) and not isinstance(usual, bool) and value == int(value) else value
