"""config.json as a `TransformerConfig` and back, by the table of architectures; what moves a logit is never ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from alignax.io import positions
from alignax.io.architectures import FAMILIES as FAMILIES
from alignax.io.architectures import Family
from alignax.io.keys import read_field, write_field
from alignax.io.tensors import Place
from alignax.models.config import TransformerConfig

_EVERYWHERE = {"quantization_config": None}
_POSITIONS = ("rope_theta", "rope_scaling", "rotary_fraction", "pattern")
_NUMERICS = ("dtype", "param_dtype", "remat", "attention", "decode_attention")
_FIELDS = {field.name: field for field in dataclasses.fields(TransformerConfig) if field.name not in _NUMERICS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(TransformerConfig):
    """A `TransformerConfig` that remembers its folder's config.json and generation_config.json, for saving.

    `dataclasses.replace` keeps them; they take no part in comparison.
    """

    source: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    generation: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a config.json: by `architectures`, or by `model_type` where it names no architecture.

    Raises:
      ValueError: when there is no such row, or architecture and model_type contradict each other.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for row in FAMILIES:
        named = architectures[0] == row.architecture if architectures else model_type == row.model_type
        if named and model_type not in (row.model_type, None):
            raise ValueError(f"config.json: architectures {architectures} and model_type {model_type!r} do not agree")
        if named:
            return row
    supported = ", ".join(row.architecture for row in FAMILIES)
    remote = "; code from the folder (auto_map) is never run" if "auto_map" in config else ""
    found = f"architecture {architectures[0]!r}" if architectures else f"model_type {model_type!r}"
    raise ValueError(f"config.json: {found} is not supported; supported: {supported}{remote}")


def read_config(
    source: Mapping[str, Any], generation: Mapping[str, Any], *, dtype: Any, compute_dtype: Any, remat: Any
) -> FolderConfig:
    """config.json as a `FolderConfig`.

    Raises:
      ValueError: naming the key, for what the decoder does not do or what is missing.
    """
    return FolderConfig(
        **_read(source, family_of(source)),
        dtype=dtype if compute_dtype is None else compute_dtype,
        param_dtype=dtype,
        remat=remat,
        source=source,
        generation=generation,
    )


def write_config(config: TransformerConfig, *, dtype: Any, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model: its folder's own keys, if it came from one, under what `config` says now.

    ids: bos_token_id, eos_token_id and pad_token_id for a model that came from no folder.
    """
    source = _source(config)
    written = _write(config, _family_for(config), source) | {"dtype": jnp.dtype(dtype).name}
    written.pop("torch_dtype", None)
    return written if source else {**ids, **written}


def tensor_names(config: TransformerConfig) -> Mapping[str, str | Place]:
    """Tree path to tensor, for the family of `config`: what `alignax.io.tensors.plan` takes."""
    family = _family_for(config)
    if not family.interleaved:
        return family.tensors
    return {
        path: place._replace(groups=config.num_heads) if isinstance(place, Place) else place
        for path, place in family.tensors.items()
    }


def name_prefix(config: TransformerConfig) -> str:
    """What the tensor names of some folders of the family of `config` lack."""
    return _family_for(config).prefix


def _read(source: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of the architecture that a config.json describes."""
    source = _usual_spelling(source, family)
    for key, value in {**_EVERYWHERE, **family.only}.items():
        if source.get(key, value) not in (value, None):
            raise ValueError(
                f"config.json: {key} is {source[key]!r}; {family.architecture} is supported with {value!r}"
            )
    values, fields = {**family.defaults, **source}, dict(family.flags)
    for field, key in family.keys.items():
        if values.get(key) is not None or field not in family.derived:
            fields[field] = read_field(values, key, _FIELDS[field].type)
    for field, derive in family.derived.items():
        fields.setdefault(field, derive(fields))
    return {**fields, **positions.read(values, family)}


def _write(config: TransformerConfig, family: Family, source: Mapping[str, Any]) -> dict[str, Any]:
    usual = {**family.defaults, **source}
    fields = {field: getattr(config, field) for field in family.keys}
    if config.attention_scalar is None and "attention_scalar" in fields:
        fields["attention_scalar"] = config.head_dim
    written = {
        **_usual_spelling(source, family),
        **family.only,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: write_field(fields[field], usual.get(key)) for field, key in family.keys.items()},
    }
    if not source or not _same_positions(config, family, source):
        written = {key: value for key, value in written.items() if key not in positions.keys(family)}
        written |= positions.write(config, family)
    return written


def _usual_spelling(source: Mapping[str, Any], family: Family) -> dict[str, Any]:
    found = dict(source)
    for other, key in family.aliases.items():
        value = found.pop(other, None)
        if value is not None and found.get(key) not in (None, value):
            raise ValueError(f"config.json: {key} is {found[key]!r} and {other} is {value!r}; keep one of them")
        if value is not None:
            found[key] = value
    return found


def _same_positions(config: TransformerConfig, family: Family, source: Mapping[str, Any]) -> bool:
    if family_of(source).architecture != family.architecture:
        return False
    found = _read(source, family)
    unchanged = all(getattr(config, field) == found.get(field, _FIELDS[field].default) for field in _POSITIONS)
    return unchanged and found["num_layers"] == config.num_layers


def _source(config: TransformerConfig) -> Mapping[str, Any]:
    return config.source if isinstance(config, FolderConfig) else {}


def _family_for(config: TransformerConfig) -> Family:
    """The row of the folder that `config` came from, or else the first, whose config.json can say what `config` is."""
    source = _source(config)
    own = family_of(source).architecture if source else None
    for row in sorted(FAMILIES, key=lambda row: row.architecture != own):
        if _fits(config, row):
            return row
    changed = {
        name: getattr(config, name)
        for name, field in _FIELDS.items()
        if field.default is not dataclasses.MISSING and getattr(config, name) != field.default
    }
    rows = [row.architecture for row in FAMILIES]
    raise ValueError(f"no Hugging Face architecture in the table has {changed}; rows: {rows}")


def _fits(config: TransformerConfig, family: Family) -> bool:
    written = _write(config, family, {})
    try:
        found = _read(written, family)
    except ValueError:  # it has another decoder, whose config.json that is not
        return False
    return _meaning(found) == _meaning({field: getattr(config, field) for field in _FIELDS})


def _meaning(fields: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: fields.get(name, field.default) for name, field in _FIELDS.items()}
    pattern = fields["pattern"]
    kinds = [pattern[layer % len(pattern)] for layer in range(fields["num_layers"])]
    return {**fields, "pattern": kinds, "attention_scalar": fields["attention_scalar"] or fields["head_dim"]}
