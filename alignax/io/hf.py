"""Hugging Face folders in and out: safetensors, config.json, generation_config.json and the tokenizer.

`load` gives a `Model` and its parameters, read tensor by tensor and straight into shards when there is a mesh; `save`
writes a folder that transformers opens, under a temporary name until it is whole. Every tensor must be there, once, in
its shape. Pickled weights are never opened and code from a folder is never run.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignax.io import families, score, tensors
from alignax.models import RULES, TransformerConfig, transformer, with_score
from alignax.sharding import Rules, shardings
from alignax.types import Model, Params

_HUB_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "merges.txt",
    "vocab.txt",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Buffers that old versions of transformers saved and that follow from config.json.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


class Loaded(NamedTuple):
    """What a folder holds. tokenizer: None without tokenizer files; config, generation: its two JSON files as dicts."""

    model: Model
    params: Params
    tokenizer: Any
    eos_ids: tuple[int, ...]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]


def load(
    folder_or_id: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: Callable[..., Any] | None = None,
    revision: str | None = None,
) -> Loaded:
    """A model from a local folder, or from a repository of the Hugging Face hub ("owner/name").

    dtype: of the parameters, whatever the folder stores. compute_dtype: what the model computes in, `dtype` if None.
    remat: see `TransformerConfig`. mesh, rules: where parameters live; the transformer's own rules if only a mesh is
    given. revision: branch, tag or commit on the hub. With both a single file and an index, the single file counts, as
    in transformers. A tied model may store lm_head.weight, if it equals the embedding.

    A sequence-classification folder with one label gives `alignax.models.with_score` of its decoder, whose `values` is
    not None: a reward model or critic.

    eos_ids come from generation_config.json, or else config.json, or else the tokenizer.

    Raises:
      ValueError: naming file, key or tensor: an architecture or option that is not supported, more labels than one,
        tensors that are missing, not expected, of a wrong shape or dtype, weights that are pickled or incomplete.
    """
    if rules is not None and mesh is None:
        raise ValueError("load: rules were given without a mesh")
    folder = _find(folder_or_id, revision)
    source = tensors.read_json(folder / "config.json")
    path = folder / "generation_config.json"
    generation = tensors.read_json(path) if path.is_file() else {}
    try:
        scored = score.is_scored(source)
        decoder = score.without_score(source) if scored else source
        config = families.read_config(decoder, generation, dtype=dtype, compute_dtype=compute_dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    model = with_score(transformer(config)) if scored else transformer(config)
    params = _read_params(folder, model, mesh, RULES if rules is None else rules)
    tokenizer = _read_tokenizer(folder)
    return Loaded(model, params, tokenizer, _eos_ids(generation, source, tokenizer), source, generation)


def save(
    folder: str | Path,
    model: Model,
    params: Params,
    tokenizer: Any = None,
    *,
    eos_ids: Sequence[int] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `load` and transformers open; parameters keep their dtype, bit for bit (NaN too).

    For a model that came from `load`, config.json and generation_config.json keep what they had, under what
    `model.config` says now. Otherwise the architecture follows from the configuration and the ids of special tokens
    from `tokenizer`. eos_ids: what ends a generation, if not that. max_shard_bytes: larger models are written as
    several files with an index. The folder appears when it is complete; a failure leaves nothing behind. On several
    processes all call this, and the first one writes.

    A model with a scalar head becomes a sequence-classification folder. Where padding and EOS are the same token,
    transformers scores a row before its final EOS, and `alignax.logprobs.last_score` after it.

    Raises:
      ValueError: before anything is written, when the folder exists and is not empty, or when the parameters are not
        those of the model: also when a scalar head stands beside the head of a language model.
      TypeError: when the model is not the shipped transformer.
    """
    folder, config = Path(folder).resolve(), model.config
    if not isinstance(config, TransformerConfig):
        raise TypeError(
            f"save: model.config is {type(config).__name__}; only a TransformerConfig has a Hugging Face form"
        )
    if max_shard_bytes <= 0:
        raise ValueError(f"save: max_shard_bytes={max_shard_bytes}; expected a positive number")
    check_free(folder)
    leaves = _plan_params(model, params)
    ids = _special_ids(config, tokenizer, eos_ids)
    dtype = next(leaf.dtype for leaf in leaves if leaf.path.removeprefix("backbone/").startswith("embed"))
    written = families.write_config(config, dtype=dtype, ids=ids)
    if model.values is not None:
        written = score.with_score(written, getattr(tokenizer, "pad_token_id", None))
    generation = config.generation if isinstance(config, families.FolderConfig) else {}
    generation = {**(generation or ids), "eos_token_id": ids["eos_token_id"]}
    if eos_ids is not None:
        written["eos_token_id"] = ids["eos_token_id"]
    with appearing(folder) as partial:
        if partial is not None:
            write_json(partial / "config.json", written)
            write_json(partial / "generation_config.json", generation)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
        tensors.write(partial, leaves, jax.tree.leaves(params), max_shard_bytes)


def _find(folder_or_id: str | Path, revision: str | None) -> Path:
    path = Path(folder_or_id)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(folder_or_id)):
        raise ValueError(f"{folder_or_id}: is neither a folder nor the name of a repository, such as 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(folder_or_id), revision=revision, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder_or_id}: there is no such folder here, and the Hugging Face hub did not give it: {error}"
        ) from error


def _read_params(folder: Path, model: Model, mesh: jax.sharding.Mesh | None, rules: Rules) -> Params:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    names = _tensor_names(model)
    leaves = tensors.plan(shapes, names)
    where = [None] * len(leaves) if mesh is None else jax.tree.leaves(shardings(shapes, mesh, rules))
    prefix, expected = families.name_prefix(model.config), {name for leaf in leaves for name in leaf.names}
    with tensors.open_folder(folder) as found:
        found = {name: tensor for name, tensor in found.items() if not _DERIVED.search(name)}
        found = {prefix + name if prefix + name in expected else name: tensor for name, tensor in found.items()}
        if model.config.tie_embeddings and model.values is None:
            _drop_equal_head(folder, found, *(str(names[path]) for path in ("head/kernel", "embed/embedding")))
        tensors.check(folder, leaves, found)
        arrays = [tensors.read(leaf, found, sharding) for leaf, sharding in zip(leaves, where)]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _tensor_names(model: Model) -> Mapping[str, str | tensors.Place]:
    names = families.tensor_names(model.config)
    return names if model.values is None else score.tensor_names(names)


def _drop_equal_head(folder: Path, found: dict[str, tensors.Tensor], head: str, embedding: str) -> None:
    left, right = found.pop(head, None), found.get(embedding)
    if left and right and not tensors.equal(left, right):
        raise ValueError(
            f"{folder}: {head} differs from {embedding}, but config.json says tie_word_embeddings; set it to false to "
            "keep both"
        )


def _read_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    # On import transformers warns that there is no PyTorch; tokenizers need none.
    logging.getLogger("transformers").addFilter(_not_about_torch)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _not_about_torch(record: logging.LogRecord) -> bool:
    return "PyTorch was not found" not in record.getMessage()


def _eos_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    for ids in (generation.get("eos_token_id"), config.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)):
        if ids is not None:
            return _checked_ids(tuple(ids) if isinstance(ids, list | tuple) else (ids,), config.get("vocab_size"))
    return ()


def _checked_ids(ids: tuple, vocab_size: int | None) -> tuple[int, ...]:
    for token in ids:
        known = isinstance(token, int) and not isinstance(token, bool) and token >= 0
        if not known or (vocab_size is not None and token >= vocab_size):
            raise ValueError(f"eos_token_id={list(ids)}; expected token ids, integers from 0 to below {vocab_size}")
    return ids


def _special_ids(config: TransformerConfig, tokenizer: Any, eos_ids: Sequence[int] | None) -> dict[str, Any]:
    generation, source = {}, {}
    if isinstance(config, families.FolderConfig):
        generation, source = config.generation, config.source
    given = _eos_ids(generation, source, tokenizer) if eos_ids is None else tuple(eos_ids)
    eos = _checked_ids(given, config.vocab_size)
    # Written even when unknown: transformers would otherwise assume the ids of the original Llama.
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "pad_token_id")}
    ids |= {name: source[name] for name in ids if name in source}
    return {**ids, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None}


def _plan_params(model: Model, params: Params) -> list[tensors.Leaf]:
    names = _tensor_names(model)
    expected = tensors.plan(jax.eval_shape(model.init, jax.random.key(0)), names)
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    if model.values is not None and "backbone/head/kernel" in paths:
        raise ValueError(
            "save: the backbone of params still has the head of its language model, and a sequence-classification "
            "folder has no place for it; save the policy as save(folder, MODEL_WITHOUT_SCORE, params['backbone']), "
            "and a critic without 'head' in params['backbone']"
        )
    different = sorted(paths ^ {leaf.path for leaf in expected})
    if different:
        raise ValueError(f"save: params are not the model's; only one of the two has {', '.join(different[:8])}")
    leaves = tensors.plan(params, names)
    for leaf, wanted in zip(leaves, expected):
        if leaf.shape != wanted.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"save: parameter {leaf.path!r} is {leaf.dtype} {leaf.shape}; expected floats of shape {wanted.shape}"
            )
    return leaves


def check_free(folder: Path) -> None:
    """That nothing is in a folder that is about to be written, as the first process sees it.

    Raises:
      ValueError: when it is a file, or holds something; on every process.
    """
    taken = jax.process_index() == 0 and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if jax.process_count() > 1:
        taken = multihost_utils.broadcast_one_to_all(np.bool_(taken))
    if taken:
        raise ValueError(f"save: {folder} exists and is not an empty folder")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path | None]:
    """A sibling that takes the folder's place when the block ends well and vanishes when it does not.

    On several processes it is the first one's, the others get None, and all leave the block when the folder is there.
    """
    if jax.process_index() != 0:
        yield None
    else:
        partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}"
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in [*partial.rglob("*"), partial]:
                _settle(path)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial)
            raise
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"alignax.io: {folder.name}")


def _settle(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on disk: a name that appears must not stand for less."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as an indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
