"""Sequence-classification folders: the Hugging Face form of a reward model or critic, a decoder with one label.

Such a folder is that of the language model but for three things: `architectures` names its class, `id2label` has one
entry, and score.weight stands where the language-model head was. So it follows from the language model's row of
`families.FAMILIES`, whichever that is.
"""

from collections.abc import Mapping
from typing import Any

from alignax.io.families import FAMILIES
from alignax.io.tensors import Place

_SUFFIX = "ForSequenceClassification"
# Gemma3ForSequenceClassification is the model that sees images, too.
_IRREGULAR = {"Gemma3ForCausalLM": "Gemma3TextForSequenceClassification"}


def is_scored(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a sequence classifier."""
    return bool(config.get("architectures")) and str(config["architectures"][0]).endswith(_SUFFIX)


def without_score(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a sequence classifier as that of the language model that it was made of.

    Raises:
      ValueError: when no row of the table has this classifier, or it has any number of labels but one.
    """
    rows = {_scored_name(row.architecture): row.architecture for row in FAMILIES}
    name = config["architectures"][0]
    if name not in rows:
        raise ValueError(f"config.json: architecture {name!r} is not supported; supported: {', '.join(rows)}")
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels")
    if count != 1 or config.get("num_labels", 1) != 1:
        raise ValueError(
            f"config.json: {name} has num_labels {config.get('num_labels')!r} and id2label {labels!r}; "
            "expected one label, the score (without either there are two)"
        )
    return {**config, "architectures": [rows[name]]}


def with_score(config: Mapping[str, Any], pad_id: int | None) -> dict[str, Any]:
    """The config.json of a language model as that of a sequence classifier with one label.

    pad_id: for a `config` without pad_token_id. transformers scores the last token that is not this one, and refuses
    batches without it.
    """
    labels = config.get("id2label")
    label = next(iter(labels.values())) if isinstance(labels, Mapping) and len(labels) == 1 else "LABEL_0"
    pad_id = pad_id if config.get("pad_token_id") is None else config["pad_token_id"]
    return {
        **config,
        "architectures": [_scored_name(config["architectures"][0])],
        "num_labels": 1,
        "id2label": {"0": label},
        "label2id": {label: 0},
        "pad_token_id": pad_id,
    }


def tensor_names(names: Mapping[str, str | Place]) -> dict[str, str | Place]:
    """Tree path to tensor name of `alignax.models.with_score(model)`, from those of the model."""
    backbone = {f"backbone/{path}": name for path, name in names.items() if path != "head/kernel"}
    return {**backbone, "score/kernel": "score.weight"}


def _scored_name(architecture: str) -> str:
    stem = architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return _IRREGULAR.get(architecture, stem + _SUFFIX)
