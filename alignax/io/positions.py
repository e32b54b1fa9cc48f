"""What config.json says about positions and single layers: rotary bases and scalings, windows, layers without rotation.

`read` and `write` are inverse to each other: `write` uses the older spelling where there are two, which transformers 4,
vLLM and transformers 5 all read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from alignax.io.architectures import Family, RopeKeys
from alignax.io.keys import Values, flag, listed, optional, positive
from alignax.models import LayerKind, TransformerConfig, rope

_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers", "no_rope_layer_interval")
_NAMES = {False: "full_attention", True: "sliding_attention"}


def read(values: Values, family: Family) -> dict[str, Any]:
    """The fields `rope_theta`, `rope_scaling`, `rotary_fraction` and `pattern` of a `TransformerConfig`.

    values: config.json over the defaults of `family`.

    Raises:
      ValueError: naming the key, for what the decoder does not do or what does not fit together.
    """
    fields, local_theta = ({}, None) if family.rope is None else _read_rope(values, family, family.rope)
    return {**fields, "pattern": _read_pattern(values, family, local_theta)}


def write(config: TransformerConfig, family: Family) -> dict[str, Any]:
    """The keys that say it; a decoder that the architecture does not have reads back as another one.

    Raises:
      ValueError: for a scaling that has no name in config.json.
    """
    return {**_write_pattern(config, family), **({} if family.rope is None else _write_rope(config, family.rope))}


def keys(family: Family) -> set[str]:
    """Every key that `read` looks at."""
    own = set() if family.rope is None else {key for key in family.rope if key is not None}
    return {*_ROPE_KEYS, *_PATTERN_KEYS, *family.layer_keys, "layer_types", *own}


def _read_rope(values: Values, family: Family, names: RopeKeys) -> tuple[dict[str, Any], float | None]:
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(values.get(key) or {}, Mapping):
            raise ValueError(f"config.json: {key} is {values[key]!r}; expected an object or null")
    if new and old and new != old:
        raise ValueError(f"config.json: rope_parameters {new} and rope_scaling {old} do not agree; keep one of them")
    new, local = (new, {}) if names.local is None else _local_rope(new)
    theta = values.get(names.theta)
    found = {"rope_theta": family.defaults[names.theta] if theta is None else theta, **(new or old or {})}
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"config.json: RoPE parameters that differ by kind of layer are not supported: {new or old}")
    key = "partial_rotary_factor"
    fraction = found.get(key, values.get(names.fraction or key))
    if names.fraction is None and fraction not in (1.0, None):
        raise ValueError(f"config.json: {key} is {fraction!r}; expected 1.0")
    fields = {
        "rope_theta": positive(found, "rope_theta", kind=float),
        "rope_scaling": _read_scaling(values, found),
        "rotary_fraction": positive({key: fraction}, key, 1.0, kind=float),
    }
    if names.local is None:
        return fields, None
    return fields, positive({**values, **local}, "rope_theta" if local else names.local, kind=float)


def _local_rope(new: Values | None) -> tuple[Values | None, Values]:
    """`rope_parameters` of global layers and of local ones."""
    if not new:
        return None, {}
    known = set(_NAMES.values())
    if not set(new) <= known or not all(isinstance(value, Mapping) for value in new.values()):
        raise ValueError(f"config.json: rope_parameters is {new}; expected RoPE parameters for each of {sorted(known)}")
    local = new.get("sliding_attention") or {}
    kind = local.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"config.json: rope type {kind!r} of sliding_attention is not supported; supported: 'default'")
    return new.get("full_attention"), local


def _read_scaling(values: Values, found: Values) -> rope.RopeScaling | None:
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return rope.LinearScaling(factor=positive(found, "factor", kind=float))
    if kind == "llama3":
        return _llama3(values, found)
    raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: 'default', 'linear', 'llama3'")


def _llama3(values: Values, found: Values) -> rope.Llama3Scaling:
    key = "original_max_position_embeddings"
    # As transformers has it: a value beside the scaling wins over the one inside, and the context is the last resort.
    original = values if values.get(key) else found
    return rope.Llama3Scaling(
        factor=positive(found, "factor", kind=float),
        low_frequency_factor=positive(found, "low_freq_factor", kind=float),
        high_frequency_factor=positive(found, "high_freq_factor", kind=float),
        original_max_positions=positive(original, key, values.get("max_position_embeddings")),
    )


def _write_rope(config: TransformerConfig, names: RopeKeys) -> dict[str, Any]:
    written = {names.theta: config.rope_theta, "rope_scaling": _write_scaling(config.rope_scaling)}
    if names.fraction is not None:
        written[names.fraction] = config.rotary_fraction
    if names.local is not None:
        bases = [kind.rope_theta for kind in config.kinds if kind.rope_theta is not None]
        written[names.local] = bases[0] if bases else config.rope_theta
    return written


def _write_scaling(scaling: object) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, rope.LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, rope.Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    raise ValueError(f"rope_scaling {scaling!r} has no name in config.json; expected LinearScaling or Llama3Scaling")


def _read_pattern(values: Values, family: Family, local_theta: float | None) -> tuple[LayerKind, ...]:
    layers = range(positive(values, family.keys["num_layers"]))
    rotary = [True for _ in layers]
    if "no_rope_layers" in family.layer_keys:
        rotary = _read_rotary(values, len(layers))
        values = {**values, "no_rope_layers": rotary}
    window = optional(values, "sliding_window", kind=int) if "sliding_window" in family.layer_keys else None
    if "use_sliding_window" in family.layer_keys and not flag(values, "use_sliding_window"):
        window = None
    always = "use_sliding_window" not in family.layer_keys and "layer_types" in family.layer_keys
    usual = [(always or window is not None) and family.is_local(values, layer) for layer in layers]
    local = _read_layer_types(values, usual, free="layer_types" in family.layer_keys)
    if any(local) and window is None:
        raise ValueError("config.json: layer_types has 'sliding_attention', but no sliding_window is in use")
    kinds = [
        LayerKind(window=window if local[i] else None, rotary=rotary[i], rope_theta=local_theta if local[i] else None)
        for i in layers
    ]
    period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in layers))
    return tuple(kinds[:period])


def _read_layer_types(values: Values, usual: Sequence[bool], *, free: bool) -> Sequence[bool]:
    types = listed(values, "layer_types", len(usual))
    if types is None:
        return usual
    for found, local in zip(types, usual):
        expected = tuple(_NAMES.values()) if free else (_NAMES[local],)
        if found not in expected:
            raise ValueError(f"config.json: layer_types has {found!r}; supported here: {', '.join(expected)}")
    return [found == _NAMES[True] for found in types]


def _read_rotary(values: Values, layers: int) -> list[bool]:
    given = listed(values, "no_rope_layers", layers)
    if given is None:
        interval = positive(values, "no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(layers)]
    if any(turns not in (0, 1) for turns in given):
        raise ValueError(f"config.json: no_rope_layers is {given}; expected 0 or 1 for each layer")
    return [bool(turns) for turns in given]


def _write_pattern(config: TransformerConfig, family: Family) -> dict[str, Any]:
    windows = [kind.window for kind in config.kinds if kind.window is not None]
    window = windows[0] if windows else None
    if "layer_types" in family.layer_keys and "use_sliding_window" not in family.layer_keys:
        window = window or config.max_positions  # transformers asks for one even where no layer is local
    every = {
        "use_sliding_window": bool(windows),
        "sliding_window": window,
        "layer_types": [_NAMES[kind.window is not None] for kind in config.layer_kinds],
        "no_rope_layers": [int(kind.rotary) for kind in config.layer_kinds],
    }
    return {key: every[key] for key in family.layer_keys}
