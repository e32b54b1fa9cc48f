"""How the tokens of whole rows attend, in training and in prefill: a function chooses, and says what and why.

The plain way is `alignax.models.attention.attend` under a mask of [B, T, T]. Where rows are long or the device has a
kernel, none is made; what it would hold is described by `alignax.models.rows.Rows`, and one of these reads it:

- TPU: splash attention, `jax.experimental.pallas.ops.tpu.splash_attention`, which takes segments, windows and
  soft-caps, and computes its masks in the kernel.
- CUDA: cuDNN's attention through `jax.nn.dot_product_attention` where a row is one segment, which is what a prefill has
  and what a boolean `segments` array says; for packed rows JAX's Pallas kernel for Triton,
  `jax.experimental.pallas.ops.gpu.attention.mha`, which takes segments.
- everywhere else, and for all that those do not take: `alignax.models.tiled`, by XLA.

All three kernels are flash attentions, forward and backward ("FlashAttention-2: Faster Attention with Better
Parallelism and Work Partitioning", Dao, https://arxiv.org/abs/2307.08691).

What has run: in Pallas' interpreter on a CPU the two Pallas kernels equal the plain way, gradients included; under jax
0.10.2 and 0.11.2 all three lower for their platform, and splash attention compiles for a v5e. On a GPU or a TPU none
has run yet; block sizes are derived, not tuned. JAX's Triton kernel is deprecated since 0.11.2 in favour of tokamax,
which asks for Python 3.12 and is not used; once the kernel is gone, `choose` says so and takes tiles.
"""

import dataclasses
import functools
import importlib
import math
import warnings
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from alignax import sharding
from alignax.models import kernels, tiled
from alignax.models.attention import LayerCache
from alignax.models.config import TransformerConfig
from alignax.models.remat import named
from alignax.models.rows import Rows
from alignax.types import Array

# Tokens of a row from which on the plain way is left. On a CPU tiles take 1.06 of its processor time at 512 tokens,
# 0.80 at 1024 and 0.70 at 2048 (a DPO update of the Llama of experiments/benchmarks, products kept). Elsewhere it is
# what one block of a kernel holds.
LONG = {"cpu": 1024, "tpu": 128, "cuda": 128, "rocm": 1024}
_LANES = 128  # rows are filled up to a multiple of this for the Pallas kernels
_HALF = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way for whole rows to attend to themselves. `str` of it is one line for a log.

    Set `TransformerConfig.attention` to one of these and it is used as it is, whatever the device and the rows.
    """

    name: str
    reason: str
    # (queries [B, T, H, hd], cache, rows, *, window, scalar, softcap) -> [B, T, H, hd]; None: the plain way
    attend: Callable[..., Array] | None = None

    def __str__(self):
        return f"attention of rows: {self.name}: {self.reason}"


def choose(
    config: TransformerConfig,
    platform: str | None = None,
    *,
    length: int | None = None,
    rows: int = 1,
    packed: bool = True,
    shared: bool = False,
    placed: bool = False,
) -> Choice:
    """The choice of `config` if it makes one, else what is best on the platform. Call it where a program is traced.

    platform: "cpu", "cuda", "rocm" or "tpu"; None: that of JAX's default device, and only then is the device asked
      whether it can run a kernel, and whether it is alone.
    length: tokens of a row; None: the model's context. rows: how many there are.
    packed: a row may hold several segments. shared: a segment may be the parent of others. placed: positions are given,
      so that columns do not tell them.
    """
    if config.attention is not None:
        return config.attention
    here, platform = platform is None, platform or kernels.default_platform()
    length = config.max_positions if length is None else length
    if length < LONG.get(platform, 1024):
        return plain(f"a row of {length} tokens is short")
    against = _unfit(config, shared, placed)
    if platform == "tpu":
        against = against or _unsplit(config, rows, here)
        return tiles(against) if against else splash()
    if platform == "cuda":
        against = against or _unfit_for_gpu(config)
        if not packed:
            against = against or (_refused_by_cudnn(config) if here else None)
            return tiles(against) if against else cudnn()
        against = against or _unfit_for_triton(config) or _unsplit(config, rows, here) or _missing()
        return tiles(against) if against else triton()
    return tiles("the kernels are for TPUs and GPUs" if platform == "cpu" else f"no kernel is known for {platform}")


def plain(reason: str = "asked for") -> Choice:
    """Attention as XLA compiles it, under a mask of [B, T, T]."""
    return Choice("plain XLA", reason)


def tiles(reason: str = "asked for", size: int | None = None) -> Choice:
    """Attention by XLA, `size` queries at a time; see `alignax.models.tiled.attend`."""
    return Choice("tiled XLA", reason, tiled.attend if size is None else functools.partial(tiled.attend, size=size))


@functools.cache
def splash(*, interpret: bool = False) -> Choice:
    """JAX's splash attention for TPUs; `interpret` runs it anywhere, slowly, for tests."""
    reason = "masks are computed in the kernel" + ", interpreted" * interpret
    return Choice("splash", reason, functools.partial(attend_splash, interpret=interpret))


@functools.cache
def triton(*, interpret: bool = False) -> Choice:
    """JAX's Pallas kernel for CUDA; `interpret` runs it anywhere, slowly, for tests."""
    reason = "it takes packed rows" + ", interpreted" * interpret
    return Choice("Pallas mha", reason, functools.partial(attend_triton, interpret=interpret))


def cudnn() -> Choice:
    """cuDNN's attention. Whoever sets it as a model's `attention` promises rows of one segment, from column 0 on."""
    return Choice("cuDNN", "a row is one segment", attend_cudnn)


def attend_splash(
    queries: Float[Array, "B T H hd"],
    cache: LayerCache,
    rows: Rows,
    *,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H hd"]:
    """Splash attention over the rows' own keys. Padding, segment 0, sees padding: finite, and nobody asks for it.

    Its output and log-sum-exp carry the name "attended", see `alignax.models.remat`.

    Raises:
      ValueError: for parents, or for a window over positions that were given.
    """
    _refuse("attend_splash", rows, window)
    length, width = queries.shape[1], queries.shape[3]
    size = length + -length % _LANES

    def attend(queries, cache, segments):
        kernel = _splash_kernel(heads_here := queries.shape[2], size, window, softcap, interpret)
        queries = (queries * (width if scalar is None else scalar) ** -0.5).swapaxes(1, 2)
        keys, values = (_filled(x.astype(queries.dtype), size, axis=2) for x in _head_major(cache))
        ids = None if segments is None else _filled(segments.astype(jnp.int32), size, axis=1)
        pairs = None if ids is None else _splash().SegmentIds(ids, ids)
        mixed = jax.vmap(kernel)(_filled(queries, size, axis=2), keys, values, pairs)
        return mixed.reshape(-1, heads_here, size, width)[:, :, :length].swapaxes(1, 2)

    return _on_own_rows(attend, queries, cache, rows.segments)


def attend_triton(
    queries: Float[Array, "B T H hd"],
    cache: LayerCache,
    rows: Rows,
    *,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H hd"]:
    """The Pallas kernel for Triton over the rows' own keys, which are repeated for the heads that share them.

    Raises:
      ValueError: for parents, a window or a soft-cap.
    """
    _refuse("attend_triton", rows, window)
    if window is not None or softcap is not None:
        raise ValueError(f"attend_triton: window={window}, softcap={softcap}; the kernel has neither")
    length, width = queries.shape[1], queries.shape[3]
    size = length + -length % _LANES

    def attend(queries, cache, segments):
        repeated = (jnp.repeat(x, queries.shape[2] // x.shape[1], axis=1).swapaxes(1, 2) for x in _head_major(cache))
        ids = None if segments is None else _filled(segments.astype(jnp.int32), size, axis=1)
        blocks = _triton().BlockSizes(**_triton_blocks(width))
        sm_scale = (width if scalar is None else scalar) ** -0.5
        arrays = (_filled(x.astype(queries.dtype), size, axis=1) for x in (queries, *repeated))
        mixed = _triton().mha(*arrays, ids, sm_scale, True, block_sizes=blocks, interpret=interpret)
        return named(mixed[:, :length], "attended")

    return _on_own_rows(attend, queries, cache, rows.segments)


def attend_cudnn(
    queries: Float[Array, "B T H hd"],
    cache: LayerCache,
    rows: Rows,
    *,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """cuDNN's attention over the rows' own keys, of which padding is skipped. It is split over a mesh by itself.

    Raises:
      ValueError: for parents, a window over positions that were given, or a soft-cap.
    """
    _refuse("attend_cudnn", rows, window)
    if softcap is not None:
        raise ValueError(f"attend_cudnn: softcap={softcap}; the kernel has none")
    keys, values = (x.swapaxes(1, 2).astype(queries.dtype) for x in _head_major(cache))
    # At least 1: what a row without tokens would get is not defined.
    lengths = None if rows.segments is None else jnp.maximum(jnp.sum(rows.segments != 0, axis=1, dtype=jnp.int32), 1)
    mixed = jax.nn.dot_product_attention(
        queries,
        keys,
        values,
        scale=(queries.shape[3] if scalar is None else scalar) ** -0.5,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return named(mixed, "attended")


def _refuse(name: str, rows: Rows, window: int | None) -> None:
    if rows.parents is not None or (window is not None and rows.positions is not None):
        what = "parents" if rows.parents is not None else f"given positions under a window of {window}"
        raise ValueError(f"{name}: {what}; the kernel compares segments and columns only, `tiles` takes everything")


def _head_major(cache: LayerCache) -> tuple[Float[Array, "B KV T hd"], Float[Array, "B KV T hd"]]:
    return cache.keys.swapaxes(2, 3), cache.values


def _filled(x: Array, size: int, axis: int) -> Array:
    """With zeros at the end: keys behind every query, queries that are cut off again, segment 0."""
    return jnp.pad(x, [(0, size - x.shape[axis] if at == axis else 0) for at in range(x.ndim)])


def _splash_kernel(heads: int, size: int, window: int | None, softcap: float | None, interpret: bool) -> Callable:
    """Of one row: (queries [H, T, hd], keys and values [KV, T, hd], segment ids) -> [H, T, hd]."""
    module, masks = _splash(), importlib.import_module(f"{_SPLASH}.splash_attention_mask")
    shape = (size, size)
    one = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(n for n in (512, 384, 256, 128) if size % n == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return module.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=module.BlockSizes(**dict.fromkeys(names, block)),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attended",
        interpret=interpret,
    )


def _triton_blocks(width: int) -> dict[str, int]:
    """Blocks that fit into the shared memory of compute capability 8.0, the oldest that Triton compiles for."""
    tall, backward = (128, 64) if width <= 64 else (64, 32)
    names = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    return {"block_q": 128, "block_k": tall} | dict.fromkeys(names, backward)


_SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"


def _splash() -> ModuleType:
    return importlib.import_module(f"{_SPLASH}.splash_attention_kernel")


@functools.cache
def _triton() -> ModuleType:
    # Imported late: it needs what JAX brings for GPUs, and it says that it is deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("jax.experimental.pallas.ops.gpu.attention")


def _on_own_rows(attend: Callable[..., Array], queries: Array, cache: LayerCache, segments: Array | None) -> Array:
    """Each device runs the kernel on its rows and heads, of the mesh in effect; XLA would give it all of them."""
    sizes = sharding.free_axes()
    if not sizes:
        return attend(queries, cache, segments)
    rows = tuple(name for name in sharding.ROW_AXES if name in sizes)
    heads, key_heads = (
        sharding.divisors(sizes, x, sharding.HEAD_AXES) for x in (queries.shape[2], cache.values.shape[1])
    )
    by_token, by_head = P(rows, None, heads), P(rows, key_heads)
    specs = (by_token, jax.tree.map(lambda _: by_head, cache), None if segments is None else P(rows))
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - set(mesh.manual_axes)  # all, those of one device too: XLA cannot split a kernel
    spread = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=by_token, axis_names=names, check_vma=False)
    return spread(queries, cache, segments)


def _unsplit(config: TransformerConfig, rows: int, here: bool) -> str | None:
    """Why a kernel cannot run on each device's own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        alone = not here or jax.device_count() == 1
        return None if alone else f"no mesh is set that says how to split a kernel over {jax.device_count()} devices"
    sizes = sharding.free_axes()
    axes = sharding.ROW_AXES, sharding.HEAD_AXES
    by_rows, by_heads = (math.prod(sizes.get(name, 1) for name in names) for names in axes)
    if rows % by_rows or config.num_heads % math.lcm(config.num_kv_heads, by_heads):  # key heads may be repeated
        heads = f"{config.num_heads} heads ({config.num_kv_heads} of keys)"
        return f"{rows} rows and {heads} do not divide among {by_rows} x {by_heads} devices"
    return None


def _unfit(config: TransformerConfig, shared: bool, placed: bool) -> str | None:
    """What no kernel takes."""
    if shared:
        return "the kernels know no parents"
    if placed and any(kind.window is not None for kind in config.kinds):
        return "the kernels' windows count columns, and positions are given"
    return None


def _unfit_for_gpu(config: TransformerConfig) -> str | None:
    if config.attention_softcap is not None:
        return f"the kernels cap no scores, attention_softcap={config.attention_softcap}"
    return None if str(config.dtype) in _HALF else f"the kernels compute in {_HALF}, dtype={config.dtype}"


def _unfit_for_triton(config: TransformerConfig) -> str | None:
    if any(kind.window is not None for kind in config.kinds):
        return "the kernel for packed rows has no windows"
    fits = config.head_dim in (16, 32, 64, 128)
    return None if fits else f"the kernel for packed rows takes heads of 16, 32, 64, 128, head_dim={config.head_dim}"


def _refused_by_cudnn(config: TransformerConfig) -> str | None:
    """cuDNN, or JAX in its name, on one head of this width."""
    one = jax.ShapeDtypeStruct((1, _LANES, 1, config.head_dim), config.dtype)
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), one, one, one)
    except Exception as error:  # whatever a GPU library, or JAX without it, has to say
        return f"cuDNN refuses ({type(error).__name__}: {error})".replace("\n", " ")
    return None


def _missing() -> str | None:
    try:
        _triton()
    except Exception as error:  # as above
        return f"the kernel cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")
    return None
