"""What the benchmarks share: probes of the machine, medians, and the random Llama they run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.types import Model


def probe(size: int = 2048, dtype: str = "float32") -> float:
    """GFLOP/s of a matrix product of that size, cubed."""
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    return 2 * size**3 / median_seconds(lambda: product(matrix, matrix).block_until_ready(), 7) / 1e9


def bandwidth(mebibytes: int = 512) -> float:
    """GB/s, read and written, of a pass over a large array in place: fresh pages would be timed too, and cost more."""
    array = jnp.ones(mebibytes * 2**18, jnp.float32)
    size, add = array.nbytes, jax.jit(lambda x: x + 1, donate_argnums=0)

    def run():
        nonlocal array
        array = add(array).block_until_ready()

    run()
    return 2 * size / median_seconds(run, 7) / 1e9


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def llama(shape: dict[str, int], *, max_positions: int, dtype: str = "float32", **options: Any) -> Model:
    """The Llama of a shape, parameters of the dtype it computes in unless told; `options` are `TransformerConfig`'s."""
    return transformer(
        TransformerConfig(
            vocab_size=shape["vocab"],
            hidden_size=shape["width"],
            intermediate_size=shape["mlp"],
            num_layers=shape["layers"],
            num_heads=shape["heads"],
            num_kv_heads=shape["kv_heads"],
            head_dim=shape["head_dim"],
            max_positions=max_positions,
            dtype=dtype,
            **{"param_dtype": dtype, **options},
        )
    )
