"""A configuration that no model can have is refused where it is written."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from alignax.models import LayerKind, TransformerConfig

GOOD = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_kv_heads": 3}, ValueError, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_layers": 0}, ValueError, "num_layers=0; expected a positive number"),
        ({"norm_eps": float("nan")}, ValueError, "norm_eps=nan; expected a positive number"),
        ({"head_dim": 5}, ValueError, "head_dim=5; rotary embedding needs an even number"),
        ({"rotary_fraction": 0.25}, ValueError, r"head_dim=4; .* channels, rotary_fraction=0.25 of them"),
        ({"rotary_fraction": 1.5}, ValueError, r"head_dim=4; .* channels, rotary_fraction=1.5 of them"),
        ({"attention_softcap": 0.0}, ValueError, "attention_softcap=0.0; expected a positive number"),
        ({"logit_softcap": -1.0}, ValueError, "logit_softcap=-1.0; expected a positive number"),
        ({"pattern": ()}, ValueError, r"pattern=\(\); expected a tuple of at least one LayerKind"),
        ({"pattern": (LayerKind(window=0),)}, ValueError, "window of a layer=0; expected a positive number"),
        ({"pattern": (LayerKind(rope_theta=-1.0),)}, ValueError, r"rope_theta of a layer=-1.0; expected a positive"),
        ({"qk_norm": True, "qk_norm_whole": True}, ValueError, "qk_norm and qk_norm_whole; expected one of them"),
        ({"dtype": jnp.int32}, ValueError, "dtype=int32; expected a floating-point dtype"),
        ({"param_dtype": "int8"}, ValueError, "param_dtype=int8; expected a floating-point dtype"),
        ({"remat": "dots"}, TypeError, "remat='dots'; expected None or a jax.checkpoint policy"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        TransformerConfig(**{**GOOD, **change})


def test_equal_configurations_are_equal():
    policy = jax.checkpoint_policies.nothing_saveable
    first = TransformerConfig(**GOOD, dtype=jnp.bfloat16, remat=policy)
    second = TransformerConfig(**GOOD, dtype="bfloat16", remat=policy)
    assert first == second and hash(first) == hash(second)


def test_layers_take_kinds_in_turn():
    local, whole = LayerKind(window=3), LayerKind()
    config = TransformerConfig(**{**GOOD, "num_layers": 5}, pattern=(local, local, whole))
    assert config.layer_kinds == (local, local, whole, local, local) and config.kinds == (local, whole)
    assert dataclasses.replace(config, num_layers=2).kinds == (local,)


def test_learned_positions_need_no_even_head():
    assert TransformerConfig(**{**GOOD, "head_dim": 5}, learned_positions=True).head_dim == 5
