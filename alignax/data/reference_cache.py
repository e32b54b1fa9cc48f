"""Log-probabilities of a fixed reference, computed once for a data set, and a file of them that is refused when stale.

    key = reference_cache.key(loaded.params, loaded.tokenizer, loaded.model.config)
    logprobs = jax.jit(functools.partial(preference.logprobs, loaded.model))
    rows = reference_cache.collect(lambda batch: logprobs(loaded.params, preference.Batch(**batch)), batches)
    reference_cache.write("reference.safetensors", key, rows)
    ...
    rows = reference_cache.read("reference.safetensors", key)       # refused for another model or tokenizer
    batch = preference.Batch(**reference_cache.fill(batch, rows))   # refused for a row it does not hold

A row is found by its tokens and its mask, so neither the order of rows, nor how they are padded or batched, matters.
Training then needs no reference in memory: `frozen=None`.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from alignax.sharding import path_name

Rows = dict[bytes, np.ndarray]  # of a row's digests of tokens and mask: float32 [tokens of its mask]

_FORMAT = "alignax reference log-probabilities 1"
_DIGEST = 16  # bytes; a row has one of its tokens and one of its mask
_REMAT = "remat"  # the one setting that changes no number


class Key(NamedTuple):
    """What log-probabilities depend on besides the row, as hexadecimal digests."""

    parameters: str
    settings: str  # of the model: what its parameters do not say, such as the dtype it computes in
    tokenizer: str  # vocabulary and special tokens
    template: str  # how it renders conversations


def key(params: Any, tokenizer: Any, config: Any = None) -> Key:
    """The digests of a model and its tokenizer.

    Args:
      params: read leaf by leaf in the order of their paths, one on the host at a time; the digest is of path, dtype,
        shape and bytes, the same however they are sharded.
      tokenizer: of transformers, or None.
      config: the model's, a dataclass or anything that prints the same in every process; None in most adapters.

    Raises:
      ValueError: for parameters of which this process holds only a part.
    """
    template = getattr(tokenizer, "chat_template", None)
    return Key(_of_parameters(params), _of_text(_settings(config)), _of_text(_tokens(tokenizer)), _of_text(template))


def collect(logprobs: Callable[[Mapping[str, Any]], Any], batches: Iterable[Mapping[str, Any]]) -> Rows:
    """The log-probabilities of every row of these batches, such as one epoch of `data.batches` gives.

    Args:
      logprobs: `(batch) -> [..., T]`, aligned with `batch["tokens"]`.
      batches: with `tokens`, `segments` and `mask` [..., T]; rows whose mask is empty are left out.
    """
    rows: Rows = {}
    for batch in batches:
        mask = np.asarray(batch["mask"], bool)
        width = mask.shape[-1]
        values = np.asarray(logprobs(batch), np.float32).reshape(-1, width)
        for name, own, value in zip(_names(batch), mask.reshape(-1, width), values, strict=True):
            if own.any():
                rows[name] = value[own]
    return rows


def fill(batch: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """The batch with `ref_logp` float32 [..., T] of its rows, 0 outside of their masks.

    Raises:
      ValueError: for a row that is not there, with its digests, and those of the same tokens under another mask.
    """
    mask = np.asarray(batch["mask"], bool)
    flat = mask.reshape(-1, mask.shape[-1])
    found = np.zeros(flat.shape, np.float32)
    for number, (name, own) in enumerate(zip(_names(batch), flat, strict=True)):
        if not own.any():
            continue
        if name not in rows:
            raise ValueError(_missing(number, name, int(own.sum()), rows))
        found[number, own] = rows[name]
    return {**batch, "ref_logp": found.reshape(mask.shape)}


def write(path: str | Path, key: Key, rows: Rows) -> None:
    """Writes one safetensors file; what was there is replaced when the new one is whole.

    Raises:
      ValueError: when there are no rows.
    """
    from safetensors.numpy import save_file

    if not rows:
        raise ValueError(f"{path}: no rows to write; expected at least one")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    lengths = np.array([len(value) for value in rows.values()], np.int64)
    digests = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 2 * _DIGEST)
    arrays = {"digests": digests, "lengths": lengths, "logp": np.concatenate(list(rows.values()))}
    part.touch()  # save_file alone would leave it readable to the owner only
    mode = part.stat().st_mode
    save_file(arrays, part, metadata={"format": _FORMAT, **key._asdict()})
    part.chmod(mode)
    os.replace(part, path)


def read(path: str | Path, key: Key) -> Rows:
    """The rows of a file that was written with the same key.

    Raises:
      ValueError: naming the file, when it is absent, broken or of another kind, or when anything of the key differs:
        what it is, its digest in the file and the one that was expected.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; expected one that reference_cache.write wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path}: its format is {metadata.get('format')!r}; expected {_FORMAT!r}")
            _check_key(path, metadata, key)
            digests, lengths, logp = (file.get_tensor(name) for name in ("digests", "lengths", "logp"))
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file of reference log-probabilities ({error})") from None
    if digests.shape != (len(lengths), 2 * _DIGEST) or lengths.sum() != len(logp):
        raise ValueError(f"{path}: {digests.shape} digests and {lengths.sum()} tokens of {len(logp)}; it is broken")
    parts = np.split(logp, np.cumsum(lengths)[:-1])
    return {digest.tobytes(): part for digest, part in zip(digests, parts, strict=True)}


def _check_key(path: str | Path, metadata: Mapping[str, str], key: Key) -> None:
    changed = [
        f"{name} (its digest is {metadata.get(name, 'missing')[:16]}, expected {digest[:16]})"
        for name, digest in key._asdict().items()
        if metadata.get(name) != digest
    ]
    if changed:
        raise ValueError(
            f"{path}: is stale, made with other {' and other '.join(changed)}; remove it and compute it anew, or name "
            "another file"
        )


def _missing(number: int, name: bytes, tokens: int, rows: Rows) -> str:
    same = [other for other in rows if other[:_DIGEST] == name[:_DIGEST]]
    others = ", ".join(other[_DIGEST:].hex() for other in same)
    why = f"the same tokens are, with other masks ({others})" if same else "nor are its tokens with another mask"
    return (
        f"reference_cache: row {number} of the batch, tokens {name[:_DIGEST].hex()}, mask {name[_DIGEST:].hex()} of "
        f"{tokens} tokens, is not among the {len(rows)} rows; {why}. The data or how it is cut and tokenised changed: "
        "expected rows that were there when it was computed"
    )


def _names(batch: Mapping[str, Any]) -> list[bytes]:
    """The digests of tokens (with their segments) and of mask of every row, without its padding."""
    width = np.shape(batch["tokens"])[-1]
    tokens, segments = (np.asarray(batch[name], "<i4").reshape(-1, width) for name in ("tokens", "segments"))
    mask = np.asarray(batch["mask"], bool).reshape(-1, width)
    out = []
    for row, parts, own in zip(tokens, segments, mask, strict=True):
        used = parts != 0
        both = (row[used].tobytes() + parts[used].tobytes(), own[used].tobytes())
        out.append(b"".join(hashlib.sha256(part).digest()[:_DIGEST] for part in both))
    return out


def _of_parameters(params: Any) -> str:
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    digest = hashlib.sha256()
    for name in sorted(leaves):
        leaf = leaves[name]
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"reference_cache: parameter {name!r} lies on devices of other processes too; expected parameters that "
                "this process can read whole"
            )
        values = np.ascontiguousarray(leaf)
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _of_text(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _tokens(tokenizer: Any) -> Any:
    if tokenizer is None:
        return None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [tokenizer.get_vocab(), special, sorted(map(str, tokenizer.all_special_tokens))]


def _settings(config: Any) -> Any:
    if not dataclasses.is_dataclass(config):
        return _printed(config)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name != _REMAT}
    return {name: getattr(value, "__qualname__", None) or _printed(value) for name, value in fields.items()}


def _printed(value: Any) -> str:
    """Its repr without addresses, which differ between processes: those of functions in an attention `Choice`, say."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
