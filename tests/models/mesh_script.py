"""Run by transformer_test.py in a process with four simulated devices: a sharded decoder against one device."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import sharding
from alignax.models import RULES, LayerKind, TransformerConfig, attention, flash, transformer
from alignax.models.moe import MixtureMLP
from alignax.models.rows import Rows

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2}
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "initializer_range": 0.3}


def outcome(model, params, tokens, segments):
    """Gradients, logits after a prefill of five columns, and logits of two more tokens."""

    def loss(params):
        logp = jax.nn.log_softmax(model.logits(params, model.hidden(params, tokens, segments).states))
        return -jnp.mean(jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1))

    @jax.jit
    def cached(params, tokens):
        hidden = model.hidden(params, tokens[:, :5], segments[:, :5], cache=model.init_cache(*tokens.shape))
        logits = [model.logits(params, hidden.states)]
        for column in (5, 6):
            one = tokens[:, column : column + 1]
            at = jnp.full_like(one, column)
            hidden = model.hidden(params, one, jnp.ones_like(one), positions=at, cache=hidden.cache)
            logits.append(model.logits(params, hidden.states))
        return logits

    return jax.jit(jax.grad(loss))(params), cached(params, tokens)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.max(np.abs(expected)))


def check_mixture(mesh):
    """Gradients of a mixture of experts, where devices know the mesh and work on their own rows, and where not."""
    config = TransformerConfig(**SIZES, **HEADS, mixture=True, num_experts=4)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 7, 16)), jnp.float32)
    shapes = jax.eval_shape(MixtureMLP(config).init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    gradient = jax.grad(lambda params, x: jnp.sum(MixtureMLP(config).apply({"params": params}, x)[0] ** 2), (0, 1))
    expected = jax.jit(gradient)(params, x)
    rules = ((r"experts/down", P(None, "tensor", None)), (r"experts", P(None, None, "tensor")), (r"", P()))
    sharded = jax.device_put(params, sharding.shardings(params, mesh, rules)), sharding.shard_batch(x, mesh)
    with jax.set_mesh(mesh):
        own_rows = jax.jit(gradient).lower(*sharded).compile()
    all_rows = jax.jit(gradient).lower(*sharded).compile()
    for compiled in (own_rows, all_rows):
        jax.tree.map(close, compiled(*sharded), expected)
    # assignments are sorted where they are: 14 rows of a device, not all 28, times 2
    assert "[28]" in own_rows.as_text() and "[56]" not in own_rows.as_text() and "[56]" in all_rows.as_text()


def check_kernel(mesh):
    """Gradients of splash attention, interpreted, where every device has its own rows and heads."""
    rng = np.random.default_rng(2)
    arrays = [jnp.asarray(rng.normal(size=(4, 40, heads, 8)), jnp.float32) for heads in (4, 2, 2)]
    segments = jnp.asarray(np.repeat([[1, 2]], 20, axis=1).repeat(4, axis=0), jnp.int32)

    def mixed(queries, keys, values, segments):
        rows = Rows(flash.splash(interpret=True).attend, (5,), segments)
        return jnp.sum(jnp.sin(rows.attend(queries, attention.as_cache(keys, values))))

    gradient = jax.jit(jax.grad(mixed, (0, 1, 2)))
    expected = gradient(*arrays, segments)
    by_head, by_row = NamedSharding(mesh, P("data", None, "tensor")), NamedSharding(mesh, P("data"))
    with jax.set_mesh(mesh):
        compiled = gradient.lower(*jax.device_put(arrays, by_head), jax.device_put(segments, by_row)).compile()
    found = compiled(*jax.device_put(arrays, by_head), jax.device_put(segments, by_row))
    jax.tree.map(close, found, expected)
    assert "all-gather" not in compiled.as_text()


def main():
    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = sharding.make_mesh(data=2, tensor=2)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 32, (4, 7)), jnp.int32)
    switches = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True, "tie_embeddings": True}
    kinds = (LayerKind(window=3), LayerKind())
    model = transformer(TransformerConfig(**SIZES, **HEADS, **switches, pattern=kinds))
    init = sharding.born_sharded(model.init, mesh, RULES)
    params = init(jax.random.key(0))
    assert params["layers"]["attn"]["o"]["kernel"].sharding.spec == P(None, "tensor", None)
    assert params["embed"]["embedding"].sharding.spec == P("tensor", None)
    assert params["layers"]["attn"]["k"]["bias"].sharding.spec == P(None, "tensor")
    assert params["layers"]["mlp"]["up"]["bias"].sharding.spec == P(None, "tensor")
    assert params["layers"]["mlp"]["down"]["bias"].sharding.spec == P()
    alone = jax.device_put(jax.device_get(params), jax.devices()[0])
    batch = sharding.shard_batch({"tokens": tokens, "segments": jnp.ones_like(tokens)}, mesh)
    found = outcome(model, params, batch["tokens"], batch["segments"])
    jax.tree.map(close, found, outcome(model, alone, tokens, jnp.ones_like(tokens)))
    check_mixture(mesh)
    check_kernel(mesh)
    print(f"{jax.device_count()} devices agree")


if __name__ == "__main__":
    main()
