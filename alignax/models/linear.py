"""The linear projection of a decoder, with the low-rank adapters that may lie beside its kernel.

y = x W + bias, and where the leaves "lora_a" [in, r] and "lora_b" [r, out] are there, y = x W + (x a) b + bias: inside
of the layer, so that no sum W + a b is ever made. See "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al.
(https://arxiv.org/abs/2106.09685); `alignax.models.lora` makes these leaves, the scale already in b.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jaxtyping import Float

from alignax.models.config import TransformerConfig
from alignax.types import Array, Params

LINEAR = r"(^|/)layers/(attn/(q|k|v|o)|mlp/(gate|up|down))/kernel$"  # the paths of kernels of this module
LEAVES = ("lora_a", "lora_b", "lora_magnitude", "lora_key", "lora_rate")  # all that may lie beside a kernel


class Linear(nn.Module):
    """x @ kernel + bias in the compute dtype, and what adapters beside the kernel add to it."""

    config: TransformerConfig
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Projects the last axis."""
        config = self.config
        normal, shape = nn.initializers.normal(config.initializer_range), (x.shape[-1], self.features)
        weights = _held(self, "kernel", normal, shape, config.param_dtype)
        bias = _held(self, "bias", nn.initializers.zeros, shape[1:], config.param_dtype) if self.use_bias else None
        beside = {name: self.get_variable("params", name) for name in LEAVES if self.has_variable("params", name)}
        if is_quantised(weights):  # checkpointed, or the floats of all layers would be kept for the backward pass
            x, bias = promote_dtype(x, bias, dtype=config.dtype)
            y = jax.checkpoint(lambda x, weights: matmul(x, dequantised(weights).astype(x.dtype)))(x, weights)
        else:
            x, kernel, bias = promote_dtype(x, weights, bias, dtype=config.dtype)
            y = matmul(x, kernel)
        if "lora_a" in beside:
            a, b = (beside[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
            y += matmul(matmul(_dropped(x, beside), a), b)
        if "lora_magnitude" in beside:
            ratio = magnitude_ratio(dequantised(weights), beside)
            y = (y.astype(jnp.float32) * _as_rank(ratio, y.ndim)).astype(y.dtype)
        return y if bias is None else y + _as_rank(bias, y.ndim)


def matmul(x: Array, kernel: Array, **options: Any) -> Array:
    """x @ kernel over the last axis of x; `options` are those of `jax.lax.dot_general`."""
    if jax.default_backend() != "cpu" or jax.device_count() > 1:  # a merged axis could lose its sharding
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), **options)
    # The kernel's gradient contracts all axes of x but the last. Over two of them XLA transposes both sides on a CPU,
    # which took as long as the product.
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel, **options).reshape(*x.shape[:-1], kernel.shape[-1])


def magnitude_ratio(kernel: Float[Array, "*L in out"], beside: Params) -> Float[Array, "*L out"]:
    """m / ||W + a b||, the norm that of each column: what DoRA multiplies the columns of W + a b by, float32.

    The norm is a constant to differentiation. It is made of ||W||^2 + 2 b . (a^T W) + b . (a^T a) b, so that W + a b is
    not. See "DoRA: Weight-Decomposed Low-Rank Adaptation", Liu et al. (https://arxiv.org/abs/2402.09353), section 4.3.
    """
    kernel, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (kernel, beside["lora_a"], beside["lora_b"]))
    transposed = a.swapaxes(-1, -2)
    cross = 2 * jnp.matmul(transposed, kernel) + jnp.matmul(jnp.matmul(transposed, a), b)
    squared = jnp.sum(jnp.square(kernel), axis=-2) + jnp.sum(b * cross, axis=-2)
    squared = jnp.maximum(squared, jnp.finfo(jnp.float32).tiny)  # a column of zeros stays one: 0 times a finite number
    return beside["lora_magnitude"].astype(jnp.float32) * jax.lax.rsqrt(squared)


def column_norms(kernel: Float[Array, "*L in out"]) -> Float[Array, "*L out"]:
    """The norm of each column, float32: the magnitude with which DoRA starts."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2))


def is_quantised(kernel: Any) -> bool:
    """Whether it is a `qwix.QArray`, see `alignax.models.quantised`."""
    return hasattr(kernel, "qvalue")


def dequantised(kernel: Any) -> Float[Array, "*L in out"]:
    """A kernel as floats: those that a quantised one stands for, any other as it is."""
    if not is_quantised(kernel):
        return jnp.asarray(kernel)
    import qwix

    return qwix.dequantize(kernel)


def merged(params: Params, *, quantised: bool = False) -> Params:
    """Parameters, of one layer or stacked, with every adapter added to its kernel and gone from beside it.

    In float32; the result has the kernel's dtype. quantised: whether quantised kernels become floats, or stay as they
    are with their adapters beside them.
    """
    if not isinstance(params, dict) or (is_quantised(params.get("kernel")) and not quantised):
        return params
    params = {name: dequantised(part) if is_quantised(part) else part for name, part in params.items()}
    if "lora_a" not in params:
        return {name: merged(part, quantised=quantised) for name, part in params.items()}
    kernel = params["kernel"].astype(jnp.float32)
    kernel += jnp.matmul(*(params[name].astype(jnp.float32) for name in ("lora_a", "lora_b")))
    if "lora_magnitude" in params:
        kernel *= jnp.expand_dims(magnitude_ratio(params["kernel"], params), -2)
    kept = {name: leaf for name, leaf in params.items() if name not in LEAVES}
    return kept | {"kernel": kernel.astype(params["kernel"].dtype)}


def _held(module: nn.Module, name: str, first: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The parameter of that name, made where there is none yet; `param` alone would trace `first` at every call."""
    if not module.has_variable("params", name):
        return module.param(name, first, shape, dtype)
    held = module.get_variable("params", name)
    if held.shape != shape:
        raise ValueError(f"{'/'.join((*module.path, name))}: shape {held.shape}; expected {shape}")
    return held


def _dropped(x: Array, beside: Params) -> Array:
    """Dropout of what enters the adapters, where there is a key: each entry is 0, or 1 / (1 - rate) of itself."""
    if "lora_key" not in beside:
        return x
    kept = 1 - beside["lora_rate"]
    mask = jax.random.bernoulli(beside["lora_key"], kept, x.shape)
    return jnp.where(mask, x / kept.astype(x.dtype), jnp.zeros((), x.dtype))


def _as_rank(row: Array, rank: int) -> Array:
    return jnp.expand_dims(row, range(rank - 1))
