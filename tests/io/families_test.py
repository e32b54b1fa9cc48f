"""config.json against `TransformerConfig`: every spelling that is read, every option that is refused."""

import json

import jax.numpy as jnp
import pytest

from alignax.io import families
from alignax.models import TransformerConfig, rope

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(source):
    return families.read_config(source, {}, dtype=jnp.float32, compute_dtype=None, remat=None)


def without(source, *keys):
    return {key: value for key, value in source.items() if key not in keys}


def test_llama_with_everything_optional_left_out():
    assert read(LLAMA) == families.FolderConfig(
        source={},
        generation={},
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        max_positions=64,
        rope_theta=10_000.0,
        norm_eps=1e-5,
    )


def test_null_is_the_same_as_absent():
    nulls = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_theta", "rope_parameters", "layer_types")
    assert read(LLAMA | dict.fromkeys(nulls)) == read(LLAMA)


def test_what_transformers_assumes_when_keys_are_absent():
    bare = without(LLAMA, "rms_norm_eps", "max_position_embeddings")
    assert (read(bare).norm_eps, read(bare).max_positions) == (1e-6, 2048)
    assert read(QWEN3).head_dim == 128 and read(QWEN3 | {"head_dim": None}).head_dim == 4


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    for row in families.FAMILIES:
        theirs = AutoConfig.for_model(row.model_type)
        assert {key: getattr(theirs, key) for key in row.defaults} == dict(row.defaults)
        assert not theirs.tie_word_embeddings and theirs.rope_parameters["rope_theta"] == 10_000.0
        assert {key: getattr(theirs, key) for key in row.only} == dict(row.only)


@pytest.mark.parametrize("source, flags", [(LLAMA, (False, False)), (QWEN2, (True, False)), (QWEN3, (False, True))])
def test_flags_of_the_families(source, flags):
    config = read(source | {"tie_word_embeddings": True, "num_key_value_heads": 2, "initializer_range": 0.1})
    assert (config.qkv_bias, config.qk_norm) == flags
    assert config.tie_embeddings and config.num_kv_heads == 2 and config.initializer_range == 0.1
    by_type = read(without(source, "architectures") | {"tie_word_embeddings": True})
    assert (by_type.qkv_bias, by_type.qk_norm) == flags


LLAMA3 = rope.Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=32)


@pytest.mark.parametrize(
    "keys, theta, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 500000}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}}, 7e3, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e3}, "rope_theta": 1.0}, 7e3, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0}, 5.0, rope.LinearScaling(factor=2.0)),
        ({"rope_scaling": {**SCALED, "original_max_position_embeddings": 32}}, 1e4, LLAMA3),
        ({"rope_parameters": {**SCALED, "original_max_position_embeddings": 32, "rope_theta": 9.0}}, 9.0, LLAMA3),
        ({"rope_scaling": SCALED, "original_max_position_embeddings": 32}, 1e4, LLAMA3),
        ({"rope_scaling": SCALED, "max_position_embeddings": 32}, 1e4, LLAMA3),
    ],
)
def test_spellings_of_rope(keys, theta, scaling):
    config = read(LLAMA | keys)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    "source, message",
    [
        (LLAMA | {"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: Llama.*Qwen3"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "is not supported"),
        (LLAMA | {"architectures": None, "model_type": "mamba"}, "model_type 'mamba' is not supported"),
        (without(LLAMA, "architectures", "model_type"), "model_type None is not supported"),
        (LLAMA | {"model_type": "mistral"}, "model_type 'mistral' do not agree"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'; LlamaForCausalLM is supported with 'silu'"),
        (LLAMA | {"attention_bias": True}, "attention_bias is True"),
        (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
        (QWEN3 | {"attention_bias": True}, "attention_bias is True"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN3 | {"use_sliding_window": True}, "use_sliding_window is True"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        (LLAMA | {"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
        (LLAMA | {"rope_scaling": {**SCALED, "factor": "8"}}, "factor is '8'; expected a positive float"),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by kind of layer"),
        (LLAMA | {"rope_parameters": {"rope_theta": 2.0}, "rope_scaling": SCALED}, "do not agree; keep one"),
        (without(LLAMA, "vocab_size"), "'vocab_size' is missing; expected a positive int"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a positive int"),
        (LLAMA | {"hidden_size": 16.5}, r"hidden_size is 16\.5"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; expected true or false"),
    ],
)
def test_what_would_change_logits_is_refused(source, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(source)


@pytest.mark.parametrize("source", [LLAMA, QWEN2, QWEN3])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5.0},
        {"rope_parameters": {**SCALED, "rope_theta": 9.0}, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ],
)
def test_written_config_reads_back_the_same_with_or_without_its_source(source, keys):
    config = read(source | keys)
    values = {name: getattr(config, name) for name in TransformerConfig.__dataclass_fields__}
    for origin in (config, TransformerConfig(**values)):
        written = families.write_config(origin, dtype=jnp.bfloat16, ids={"eos_token_id": 7})
        assert read(json.loads(json.dumps(written))) == config
        assert written["architectures"] == source["architectures"] and written["dtype"] == "bfloat16"
        assert ("rope_parameters" in written) == (origin is config and "rope_parameters" in keys)
        assert written.get("eos_token_id") == (None if origin is config else 7)


def test_layer_types_follow_the_number_of_layers():
    import dataclasses

    config = read(QWEN2 | {"layer_types": ["full_attention"] * 3})
    written = families.write_config(dataclasses.replace(config, num_layers=2), dtype=jnp.float32, ids={})
    assert written["layer_types"] == ["full_attention"] * 2 and written["num_hidden_layers"] == 2


def test_scaling_without_a_name_is_refused():
    config = read(LLAMA)
    object.__setattr__(config, "rope_scaling", abs)
    with pytest.raises(ValueError, match=r"has no name in config\.json"):
        families.write_config(config, dtype=jnp.float32, ids={})


def test_flags_of_no_family_are_refused():
    values = {name: getattr(read(LLAMA), name) for name in TransformerConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"no Hugging Face architecture in the table has .*qk_norm': True"):
        families.tensor_names(TransformerConfig(**values | {"qkv_bias": True, "qk_norm": True}))
