"""Adapters in and out as the folders of the PEFT library: adapter_config.json and adapter_model.safetensors.

Tensor names follow from those of the base's architecture (`alignax.io.names`). A projection that the architecture keeps
in one tensor with others (Phi-3's qkv_proj, GPT-2's c_attn) has no adapters of its own there, and is refused. Options
of PEFT that change the network are never ignored: what `LoraConfig` cannot say is refused by its key. Nothing but
safetensors is opened.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from alignax.io import families, hf, score, tensors
from alignax.models import LoraConfig, TransformerConfig, lora
from alignax.models.linear import LINEAR
from alignax.types import Model, Params

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = "base_model.model."  # what PEFT puts before the names of the model it wraps
_SCORE = "score/kernel"
_ENDS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_magnitude": ".lora_magnitude_vector"}
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")
# Keys that change nothing once the weights are there, which say themselves what they belong to.
_SAY_NOTHING = """auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out
inference_mode layers_pattern loftq_config lora_ga_config megatron_core parent_library peft_version qalora_group_size
revision runtime_config target_modules task_type""".split()
_ONLY = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva")}  # else the base moves


def save(
    folder: str | Path, model: Model, adapters: Params, config: LoraConfig, *, base_name: str | None = None
) -> None:
    """Writes a folder that `load` and PEFT open, complete or not at all. Of several processes the first one writes.

    Args:
      folder: new, or empty.
      model: the base's: the shipped transformer, with a scalar head or without.
      adapters: as `alignax.models.lora.init` makes them; they are written in their dtypes.
      config: theirs. `full` may name the scalar head only.
      base_name: the base's folder or hub name, for PEFT to find.

    Raises:
      ValueError: before anything is written: for a folder that is not empty, adapters that do not fit the model, and
        projections that the architecture keeps in one tensor with others.
      TypeError: when the model is not the shipped transformer.
    """
    folder = Path(folder).resolve()
    hf.check_free(folder)
    places = _places(model)
    lora.check(_shapes(model), adapters, config)
    leaves = tensors.plan(adapters, _adapter_places(places, adapters))
    targets = {leaf.path.rpartition("/")[0] + "/kernel" for leaf in leaves if leaf.path.endswith("/lora_a")}
    chosen = {path: places[path] for path in sorted(targets)}
    written = _written(config, _suffixes(chosen, places), base_name, scored=model.values is not None)
    written["fan_in_fan_out"] = not all(place.transposed for place in chosen.values())
    if config.full is not None:
        written["modules_to_save"] = ["score"]
    with hf.appearing(folder) as partial:
        if partial is not None:
            hf.write_json(partial / _CONFIG, written)
        tensors.write(partial, leaves, jax.tree.leaves(adapters), single=_WEIGHTS)


def check(model: Model, config: LoraConfig) -> None:
    """That `save` can write the adapters that `config` asks for.

    Raises:
      ValueError: for targets that match no projection, and those that the architecture keeps in one tensor with others.
      TypeError: when the model is not the shipped transformer.
    """
    places, shapes = _places(model), _shapes(model)
    _adapter_places(places, jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, config), shapes))


def load(folder: str | Path, model: Model) -> tuple[Params, LoraConfig]:
    """The adapters of a local PEFT folder, float32, and their configuration, whose `targets` are those that are there.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the base's, of which only the configuration is read.

    Raises:
      ValueError: naming the key or tensor: a method that is not LoRA, an option that cannot be said here (ranks that
        differ, biases, layers of choice, a base that was moved), tensors that are missing, not expected, of a wrong
        shape, or of a projection that the architecture keeps in one tensor with others; weights that are pickled.
      TypeError: when the model is not the shipped transformer.
    """
    folder = Path(folder)
    source = tensors.read_json(folder / _CONFIG)
    places, shapes = _places(model), _shapes(model)
    config = _config(folder / _CONFIG, source, scored=model.values is not None)
    path = folder / _WEIGHTS
    if not path.is_file():
        hint = "; adapter_model.bin is never opened: convert it" if (folder / "adapter_model.bin").exists() else ""
        raise ValueError(f"{path}: there is no such file{hint}")
    with tensors.open_file(path) as found:
        config = dataclasses.replace(config, targets=_targets(path, found, places))
        tree = jax.eval_shape(lambda base: lora.init(jax.random.key(0), base, config), shapes)
        leaves = tensors.plan(tree, _adapter_places(places, tree))
        tensors.check(folder, leaves, found, source=_CONFIG)
        arrays = [tensors.read(leaf, found, None) for leaf in leaves]
    return jax.tree.unflatten(jax.tree.structure(tree), arrays), config


def _shapes(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def _places(model: Model) -> dict[str, tensors.Place]:
    """The tensor of every kernel that may have adapters, and of the scalar head, by tree path."""
    if not isinstance(model.config, TransformerConfig):
        raise TypeError(
            f"peft: model.config is {type(model.config).__name__}; only a TransformerConfig has a PEFT form"
        )
    names = families.tensor_names(model.config)
    names = names if model.values is None else score.tensor_names(names)
    names = {
        path: name if isinstance(name, tensors.Place) else tensors.Place(name, True) for path, name in names.items()
    }
    return {path: place for path, place in names.items() if re.search(LINEAR, path) or path == _SCORE}


def _adapter_places(places: Mapping[str, tensors.Place], adapters: Params) -> dict[str, tensors.Place]:
    """The tensor of every leaf of the adapters.

    Raises:
      ValueError: for one whose kernel is a part of a tensor, or trained in full and not the scalar head.
    """
    found = {}
    for path in (
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(adapters)
    ):
        module, _, name = path.rpartition("/")
        kernel = f"{module}/kernel"
        if kernel not in places or (name not in _ENDS and path != _SCORE):
            raise ValueError(f"peft: parameter {path!r}; expected adapters of {sorted(places)}")
        place = places[kernel]
        if parts := _parts(places, place.name):
            raise ValueError(
                f"peft: the architecture keeps {parts} in one tensor, {place.name}, so that {path!r} has no form there:"
                " merge the adapters into the base instead"
            )
        name = place.name if path == _SCORE else place.name.removesuffix(".weight") + _ENDS[name]
        found[path] = tensors.Place(_WRAPPED + name, transposed=not path.endswith("/lora_magnitude"))
    return found


def _parts(places: Mapping[str, tensors.Place], name: str) -> list[str]:
    """The kernels that share a tensor; none for a tensor that is one kernel."""
    paths = [path for path, place in places.items() if place.name == name]
    return paths if len(paths) > 1 else []


def _targets(path: Path, found: Mapping[str, Any], places: Mapping[str, tensors.Place]) -> str:
    """The regex of the kernels whose adapters are in the file."""
    modules = {re.sub(r"\.\d+\.", ".{}.", name.removeprefix(_WRAPPED)) for name in found}
    kernels = {kernel: place.name.removesuffix("weight") for kernel, place in places.items() if kernel != _SCORE}
    there = [kernel for kernel, start in kernels.items() if any(name.startswith(start) for name in modules)]
    if not there:
        raise ValueError(f"{path}: holds no adapters of the model's projections: {sorted(found)[:4]}")
    names = "|".join(re.escape(kernel.removesuffix("/kernel").removeprefix("backbone/")) for kernel in there)
    return LINEAR if len(there) == len(kernels) else f"(^|/)({names})/kernel$"


def _config(path: Path, source: Mapping[str, Any], *, scored: bool) -> LoraConfig:
    if source.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {source.get('peft_type')!r}; expected 'LORA'")
    for key, value in source.items():
        known = key in _READ or key in _SAY_NOTHING
        if not known and value not in _ONLY.get(key, (None, False, {}, [])):
            raise ValueError(
                f"{path}: {key} is {value!r}, which is not supported; expected {_ONLY.get(key, (None,))[0]!r}"
            )
    saved = source.get("modules_to_save") or []
    if set(saved) - ({"score", "classifier"} if scored else set()):
        raise ValueError(f"{path}: modules_to_save is {saved}; expected {['score'] if scored else None}")
    return LoraConfig(
        rank=source.get("r", 8),
        alpha=source.get("lora_alpha", 8),
        dropout=source.get("lora_dropout", 0.0),
        rslora=source.get("use_rslora", False),
        dora=source.get("use_dora", False),
        full=f"(^|/){_SCORE}$" if saved else None,
    )


def _written(config: LoraConfig, targets: list[str], base_name: str | None, *, scored: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _suffixes(chosen: Mapping[str, tensors.Place], places: Mapping[str, tensors.Place]) -> list[str]:
    """The shortest ends of the modules' names that name no other module of a layer."""
    modules = {place.name.removesuffix(".weight") for place in places.values()}

    def shortest(module: str) -> str:
        parts = module.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        return next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in modules) == 1)

    return [shortest(place.name.removesuffix(".weight")) for place in chosen.values()]
