"""config.json against `TransformerConfig`: every spelling that is read, every option that is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from alignax.io import families
from alignax.models import LayerKind, TransformerConfig, gelu, gelu_tanh, rope

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
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
GEMMA2 = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 5}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 8}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
OLMO2 = LLAMA | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_key_value_heads": 2}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
GPT_NEOX = LLAMA | {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "rotary_pct": 0.5}
EVERY = [LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA2, GEMMA3, OLMO2, GPT2, GPT_NEOX]
EVERY += [PHI3 | {"partial_rotary_factor": 0.5}, SMOLLM3 | {"no_rope_layer_interval": 2}]
WINDOW, FULL, UNROTATED = LayerKind(window=5), LayerKind(), LayerKind(rotary=False)
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
    assert read(SMOLLM3 | dict.fromkeys(("rope_theta", "no_rope_layers"))) == read(SMOLLM3)


def test_what_transformers_assumes_when_keys_are_absent():
    bare = without(LLAMA, "rms_norm_eps", "max_position_embeddings")
    assert (read(bare).norm_eps, read(bare).max_positions) == (1e-6, 2048)
    assert read(QWEN3).head_dim == 128 and read(QWEN3 | {"head_dim": None}).head_dim == 4


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    for row in families.FAMILIES:
        theirs = AutoConfig.for_model(row.model_type)
        turned = theirs.rope_parameters if row.rope else {}
        local, turned = turned.get("sliding_attention", {}), turned.get("full_attention", turned)
        found = {field.name: field.default for field in dataclasses.fields(theirs)} | {
            "rope_theta": turned.get("rope_theta"),
            "rotary_emb_base": turned.get("rope_theta"),
            "rotary_pct": turned.get("partial_rotary_factor"),
            "partial_rotary_factor": turned.get("partial_rotary_factor"),
            "rope_local_base_freq": local.get("rope_theta"),
            "sliding_window_pattern": getattr(theirs, "_sliding_window_pattern", None),
        }
        assert {key: found[key] for key in row.defaults} == dict(row.defaults), row.architecture
        assert all(found[key] in (value, None) for key, value in row.only.items()), row.architecture
        assert theirs.tie_word_embeddings == row.defaults.get("tie_word_embeddings", False)


def test_what_they_assume_about_single_layers():
    from transformers import AutoConfig

    for row in families.FAMILIES:
        theirs = AutoConfig.for_model(row.model_type)
        source = theirs.to_dict() | {"architectures": [row.architecture]}
        bare = without(source, "layer_types", "no_rope_layers", "_sliding_window_pattern", "rope_parameters")
        kinds = read(bare).layer_kinds
        windows = [kind.window is not None for kind in kinds]
        types = getattr(theirs, "layer_types", None) or [getattr(theirs, "sliding_window", None)] * len(kinds)
        assert windows == [kind not in (None, "full_attention") for kind in types], row.architecture
        assert [kind.rotary for kind in kinds] == list(getattr(theirs, "no_rope_layers", [True] * len(kinds)))
        assert read(source) == read(bare), row.architecture


@pytest.mark.parametrize(
    "source, pattern",
    [
        (LLAMA, (FULL,)),
        (QWEN2 | {"sliding_window": 5}, (FULL,)),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, (FULL, WINDOW, WINDOW)),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, (WINDOW,)),
        (MISTRAL | {"sliding_window": 5}, (WINDOW,)),
        (MISTRAL, (LayerKind(window=4096),)),
        (MISTRAL | {"sliding_window": None}, (FULL,)),
        (GEMMA2, (WINDOW, FULL)),
        (GEMMA2 | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]}, (FULL, FULL, WINDOW)),
        (GEMMA3 | {"sliding_window_pattern": 3, "rope_local_base_freq": 7}, (LayerKind(5, True, 7.0),) * 2 + (FULL,)),
        (
            GEMMA3 | {"rope_parameters": {"full_attention": {"rope_theta": 9}, "sliding_attention": {"rope_theta": 8}}},
            (LayerKind(5, True, 8.0),) * 5 + (FULL,),
        ),
        (PHI3, (FULL,)),
        (PHI3 | {"sliding_window": 5}, (WINDOW,)),
        (SMOLLM3 | {"no_rope_layer_interval": 2}, (FULL, UNROTATED)),
        (SMOLLM3 | {"no_rope_layers": [0, 1, 1]}, (UNROTATED, FULL, FULL)),
        (
            SMOLLM3 | {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 5},
            (LayerKind(5, False), FULL, FULL),
        ),
        (GPT2, (FULL,)),
    ],
)
def test_kinds_of_layer(source, pattern):
    assert read(source).pattern == pattern


def test_switches_of_the_newer_families():
    gemma = read(GEMMA3 | {"query_pre_attn_scalar": 12, "final_logit_softcapping": 7})
    assert gemma.centred_scales and gemma.post_norm and gemma.scale_embeddings and gemma.qk_norm and gemma.pre_norm
    assert (gemma.attention_scalar, gemma.logit_softcap, gemma.attention_softcap) == (12.0, 7.0, None)
    assert (gemma.rope_theta, gemma.head_dim, gemma.activation, gemma.tie_embeddings) == (1e6, 256, gelu_tanh, True)
    assert (read(GEMMA2).attention_softcap, read(GEMMA2).logit_softcap, read(GEMMA2).rope_theta) == (50.0, 30.0, 1e4)
    assert read(GEMMA2 | {"final_logit_softcapping": None}).logit_softcap is None
    olmo = read(OLMO2)
    assert olmo.post_norm and not olmo.pre_norm and olmo.qk_norm_whole and not olmo.qk_norm
    neox = read(GPT_NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 77})
    assert neox.parallel and neox.layer_norm and neox.qkv_bias and neox.out_bias and neox.mlp_bias
    assert (neox.rotary_fraction, neox.rope_theta, neox.activation, neox.gated_mlp) == (0.5, 77.0, gelu, False)
    assert read(GPT_NEOX | {"rope_parameters": {"partial_rotary_factor": 1.0}}).rotary_fraction == 1.0
    gpt2 = read(GPT2 | {"activation_function": "relu"})
    assert gpt2.learned_positions and gpt2.layer_norm and gpt2.tie_embeddings and not gpt2.parallel
    assert (gpt2.intermediate_size, gpt2.head_dim, gpt2.max_positions, gpt2.activation) == (64, 4, 64, jax.nn.relu)
    assert read(GPT2 | {"n_inner": 24}).intermediate_size == 24
    llama = read(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert llama.qkv_bias and llama.out_bias and llama.mlp_bias


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
        (
            LLAMA | {"architectures": ["BloomForCausalLM"]},
            "'BloomForCausalLM' is not supported; supported: Llama.*GPTNe",
        ),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "is not supported"),
        (LLAMA | {"architectures": None, "model_type": "mamba"}, "model_type 'mamba' is not supported"),
        (without(LLAMA, "architectures", "model_type"), "model_type None is not supported"),
        (LLAMA | {"model_type": "mistral"}, "model_type 'mistral' do not agree"),
        (LLAMA | {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; supported: silu, .*gelu_pytorch_tanh"),
        (LLAMA | {"attention_bias": 1}, "attention_bias is 1; expected true or false"),
        (
            LLAMA | {"layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention'; supported here: full",
        ),
        (
            MISTRAL | {"layer_types": ["full_attention"] * 3},
            "layer_types has 'full_attention'; supported here: sliding",
        ),
        (QWEN2 | {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries; the model has 3 layers"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 3}, "'sliding_attention', but no sliding_window is in use"),
        (GEMMA2 | {"sliding_window": None}, "'sliding_attention', but no sliding_window is in use"),
        (
            GEMMA2 | {"layer_types": ["chunked_attention"] * 3},
            "layer_types has 'chunked_attention'; supported here: full",
        ),
        (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (
            GEMMA3 | {"attn_logit_softcapping": 5.0},
            "attn_logit_softcapping is 5.0; Gemma3ForCausalLM is supported with No",
        ),
        (GEMMA3 | {"rope_parameters": {"rope_theta": 5.0}}, "expected RoPE parameters for each of"),
        (
            GEMMA3 | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope type 'linear' of sliding_attention is not supported",
        ),
        (PHI3 | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope' is not supported"),
        (PHI3 | {"partial_rotary_factor": 0.3}, "head_dim=4; rotary embedding needs an even number of channels"),
        (SMOLLM3 | {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; the model has 3 layers"),
        (SMOLLM3 | {"no_rope_layers": [1, 2, 0]}, r"no_rope_layers is \[1, 2, 0\]; expected 0 or 1 for each layer"),
        (GEMMA2 | {"layer_types": "full_attention"}, "layer_types is 'full_attention'; expected a list"),
        (GEMMA3 | {"sliding_window_pattern": 0}, "sliding_window_pattern is 0; expected a positive int"),
        (
            QWEN2 | {"use_sliding_window": True, "max_window_layers": -1},
            "max_window_layers is -1; expected an int from 0",
        ),
        (MISTRAL | {"sliding_window": -1}, "sliding_window is -1; expected a positive int"),
        (LLAMA | {"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object or null"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT_NEOX | {"use_parallel_residual": None}, "use_parallel_residual is None; expected true or false"),
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
    with pytest.raises(ValueError, match=f"(config.json|TransformerConfig): .*{message}"):
        read(source)


@pytest.mark.parametrize("source", EVERY, ids=lambda source: source["model_type"])
def test_every_family_reads_back_with_or_without_its_source(source):
    config = read(source)
    values = {name: getattr(config, name) for name in TransformerConfig.__dataclass_fields__}
    for origin in (config, TransformerConfig(**values), dataclasses.replace(config, num_layers=2)):
        written = families.write_config(origin, dtype=jnp.float32, ids={})
        again = read(json.loads(json.dumps(written)))
        assert again.layer_kinds == origin.layer_kinds
        same = {"pattern": origin.pattern, "num_layers": origin.num_layers}
        assert dataclasses.replace(again, **same) == dataclasses.replace(config, **same)
        assert written["architectures"] == source["architectures"]


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
    config = read(QWEN2 | {"layer_types": ["full_attention"] * 3})
    written = families.write_config(dataclasses.replace(config, num_layers=2), dtype=jnp.float32, ids={})
    assert written["layer_types"] == ["full_attention"] * 2 and written["num_hidden_layers"] == 2


def test_a_decoder_that_its_family_cannot_say_becomes_another():
    config = dataclasses.replace(read(LLAMA | {"rope_theta": 7.0, "eos_token_id": 3}), pattern=(WINDOW,))
    written = families.write_config(config, dtype=jnp.float32, ids={})
    assert written["architectures"] == ["MistralForCausalLM"] and written["eos_token_id"] == 3
    assert read(written) == config


@pytest.mark.parametrize(
    "change",
    [{"pattern": (WINDOW, LayerKind(window=6))}, {"logit_softcap": 3.0}, {"parallel": True}],
)
def test_a_decoder_that_no_family_can_say_is_refused(change):
    with pytest.raises(ValueError, match=f"no Hugging Face architecture in the table has .*{next(iter(change))}"):
        families.tensor_names(dataclasses.replace(read(LLAMA | {"head_dim": 10}), **change))


def test_an_activation_without_a_name_is_refused():
    config = dataclasses.replace(read(LLAMA), activation=jnp.tanh)
    with pytest.raises(ValueError, match=r"has no name in config\.json; named: silu"):
        families.write_config(config, dtype=jnp.float32, ids={})


def test_scaling_without_a_name_is_refused():
    config = read(LLAMA)
    object.__setattr__(config, "rope_scaling", abs)
    with pytest.raises(ValueError, match=r"has no name in config\.json"):
        families.write_config(config, dtype=jnp.float32, ids={})


def test_flags_of_no_family_are_refused():
    values = {name: getattr(read(LLAMA), name) for name in TransformerConfig.__dataclass_fields__}
    with pytest.raises(ValueError, match=r"no Hugging Face architecture in the table has .*qk_norm': True"):
        families.tensor_names(TransformerConfig(**values | {"qkv_bias": True, "qk_norm": True}))
