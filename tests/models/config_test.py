"""A configuration that no model can have is refused where it is written."""

import jax
import jax.numpy as jnp
import pytest

from alignax.models import TransformerConfig

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
