"""How one new token of each row attends to a cache: a function chooses for the device, and says what and why.

The plain way is `alignax.models.attention`: two matrix products over all slots under a mask. On CUDA there is a kernel
that pays for filled slots only: JAX's own decode attention, `jax.experimental.pallas.ops.gpu.decode_attention.mqa`, a
flash attention of a few query heads over one key head between a first and a last slot, which also returns what merging
needs, the largest score and the sum (the split of keys is that of "Flash-Decoding for long-context inference", Dao et
al., https://pytorch.org/blog/flash-decoding/). One entry of its batch is a row and a key head; for a shared prompt it
is a prompt and a key head, and the query heads of the whole group ride along, so that its keys are read once for them.

What has run: in Pallas' interpreter on a CPU it equals the plain way, and under jax 0.10.2 and 0.11.2 it lowers for
CUDA. On a GPU it has not run yet; the sizes of its blocks are derived, not tuned. jax 0.11.2 ships the kernel
unchanged, but warns that it and Pallas' Triton backend are to go; once the kernel is gone `choose` says so and takes
the plain way. tokamax 0.0.17 (read, not run) has nothing better for one token: its `ops.gpu` flash attentions take
spans and return the sums, but the one for Triton runs on that same backend, the one for Mosaic, which outlives it,
cannot split the keys of a span among programs, and both ask for jax 0.11.1 and Python 3.12.
"""

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.models.attention import ForkedCache, LayerCache, SlotMajorCache
from alignax.models.config import TransformerConfig
from alignax.types import Array

PIECE = 64  # slots; a cache for the kernel holds whole pieces, and programs share the work on one key head by pieces
PROGRAMS = 512  # enough to keep about 130 processors busy
_HEAD_DIMS = (16, 32, 64, 128, 256)  # Triton's blocks are powers of two, its products 16 wide at least
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to attend with one query per row, and the cache that it reads. `str` of it is one line for a log.

    Set `TransformerConfig.decode_attention` to one of these and it is used as it is, whatever the device.
    """

    name: str
    reason: str
    # (queries [R, 1, H, hd], cache, spans, *, scalar, softcap) -> [R, 1, H, hd]; None: the plain way
    attend: Callable[..., Array] | None = None
    slot_major: bool = False  # keys are stored as [B, KV, S, hd], see `SlotMajorCache`; else as [B, KV, hd, S]
    slots_multiple: int = 1  # the slots of a cache are a multiple of this

    def __str__(self):
        layout = "[B, KV, S, hd]" if self.slot_major else "[B, KV, hd, S]"
        return f"decode attention: {self.name}, keys {layout}: {self.reason}"


class Spans(NamedTuple):
    """What a row's new token sees: the slots from `start` to before `stop`, of its own and of what its prompt shares.

    A start of None is 0. With a window the rows of one prompt may see different parts of it.
    """

    start: Int[Array, " R"] | None
    stop: Int[Array, " R"]
    shared_start: Int[Array, "B group"] | None = None
    shared_stop: Int[Array, " B"] | None = None  # None: nothing is shared


def choose(config: TransformerConfig, platform: str | None = None) -> Choice:
    """The choice of `config` if it makes one, else what is best on the platform. Call it where a program is traced.

    platform: "cpu", "cuda", "rocm" or "tpu"; None: that of JAX's default device, and only then is the device asked
      whether it can run the kernel, and whether it is alone.
    """
    if config.decode_attention is not None:
        return config.decode_attention
    against = None
    if platform is None:
        platform, against = _here()
    if platform == "cpu":
        return plain("the kernels are for GPUs")
    if platform == "tpu":
        return plain("JAX's paged kernels return no sums, without which what a prompt shares cannot be merged")
    if platform != "cuda":
        return plain(f"no kernel is known for {platform}")
    against = against or _unfit(config) or _missing()
    return plain(against) if against else pallas()


def plain(reason: str = "asked for") -> Choice:
    """Attention as XLA compiles it, over all slots."""
    return Choice("plain XLA", reason)


@functools.cache
def pallas(*, interpret: bool = False) -> Choice:
    """JAX's Pallas kernel for CUDA; `interpret` runs it anywhere, slowly, for tests."""
    attend = functools.partial(attend_spans, interpret=interpret)
    reason = "it reads filled slots only" + ", interpreted" * interpret
    return Choice("Pallas mqa", reason, attend, slot_major=True, slots_multiple=PIECE)


def default_platform() -> str:
    """That of JAX's default device: "cpu", "cuda", "rocm" or "tpu"."""
    platform = jax.default_backend()
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _here() -> tuple[str, str | None]:
    """The default platform, and what speaks against a kernel on its devices."""
    platform = default_platform()
    if platform != "cuda":
        return platform, None
    device = jax.devices()[0]
    if float(getattr(device, "compute_capability", 0)) < 8:
        return "cuda", f"{device.device_kind} is older than what Triton compiles for (compute capability 8.0)"
    # XLA would gather the whole cache on every device. Where each device works on its own rows (`jax.shard_map`, one
    # process per device) a caller may set `decode_attention=kernels.pallas()`.
    if jax.device_count() > 1:
        return "cuda", f"XLA does not split a kernel over the {jax.device_count()} devices"
    return "cuda", None


def _unfit(config: TransformerConfig) -> str | None:
    """What the kernel does not take."""
    if config.attention_softcap is not None:
        return f"the kernel caps no scores, attention_softcap={config.attention_softcap}"
    if config.head_dim not in _HEAD_DIMS:
        return f"the kernel takes heads of {_HEAD_DIMS}, head_dim={config.head_dim}"
    if str(config.dtype) not in _DTYPES:
        return f"the kernel computes in {_DTYPES}, dtype={config.dtype}"
    return None


def _missing() -> str | None:
    try:
        _mqa()
    except Exception as error:  # whatever a GPU library, or JAX without the module, has to say
        return f"the kernel cannot be imported ({type(error).__name__}: {error})".replace("\n", " ")
    return None


@functools.cache
def _mqa() -> Callable[..., tuple[Array, tuple[Array, Array]]]:
    # Imported late: it needs what JAX brings for GPUs, and it says that it is deprecated.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("jax.experimental.pallas.ops.gpu.decode_attention").mqa


def spans(config: TransformerConfig, positions: Int[Array, " R"], lengths: Int[Array, " B"] | None) -> list[Spans]:
    """What each kind of layer sees, for a token at `positions` whose slot is filled.

    lengths: the shared slots of each prompt, after which its rows' own slots begin; None: rows share nothing.
    """
    if lengths is None:
        starts = [None if kind.window is None else positions - kind.window + 1 for kind in config.kinds]
        return [Spans(start, positions + 1) for start in starts]
    of_rows = jnp.repeat(lengths, len(positions) // len(lengths))
    found = []
    for kind in config.kinds:
        first = None if kind.window is None else positions - kind.window + 1
        start, shared = (None, None) if first is None else (first - of_rows, first.reshape(len(lengths), -1))
        found.append(Spans(start, positions + 1 - of_rows, shared, lengths))
    return found


def attend_spans(
    queries: Float[Array, "R T H hd"],
    cache: LayerCache | ForkedCache,
    spans: Spans,
    *,
    scalar: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "R T H hd"]:
    """What `attend` and `attend_forked` compute for T = 1, by the kernel, slots outside `spans` unread.

    The kernel rounds a part that is not yet divided to the dtype of the queries; the rest is float32.

    Raises:
      ValueError: for a soft-cap, several queries per row, or keys stored for the plain way.
    """
    own = cache.own if isinstance(cache, ForkedCache) else cache
    if softcap is not None or queries.shape[1] != 1 or not isinstance(own, SlotMajorCache):
        raise ValueError(
            f"attend_spans: softcap={softcap}, {queries.shape[1]} queries per row, a {type(own).__name__}; expected"
            " no soft-cap, one query and a SlotMajorCache"
        )
    rows, _, heads, width = queries.shape
    grouped = queries.reshape(rows, own.keys.shape[1], -1, width)
    sm_scale = (width if scalar is None else scalar) ** -0.5
    parts = [_part(grouped, own, spans.start, spans.stop, sm_scale, interpret)]
    if isinstance(cache, ForkedCache):
        parts.append(_shared_part(grouped, cache.shared, spans, sm_scale, interpret))
    mixed, largest, total = (jnp.stack(leaves) for leaves in zip(*parts))
    scales = jnp.exp(largest - jnp.max(largest, axis=0, keepdims=True))  # a part that sees nothing has total 0
    mixed, total = jnp.sum(scales[..., None] * mixed, axis=0), jnp.sum(scales * total, axis=0)
    return (mixed / jnp.where(total == 0, 1.0, total)[..., None]).astype(queries.dtype).reshape(rows, 1, heads, width)


def _shared_part(
    grouped: Float[Array, "R KV G hd"], cache: LayerCache, spans: Spans, sm_scale: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """The sums over the shared slots: one read for all rows of a prompt, unless a window shows each its own."""
    (prompts, kv_heads, _, width), rows = cache.keys.shape, grouped.shape[0]
    by_prompt = grouped.reshape(prompts, rows // prompts, kv_heads, -1, width)
    stop = jnp.zeros(prompts, jnp.int32) if spans.shared_stop is None else spans.shared_stop
    if spans.shared_start is None:
        queries = by_prompt.swapaxes(1, 2).reshape(prompts, kv_heads, -1, width)
        part = _part(queries, cache, None, stop, sm_scale, interpret)
        part = (x.reshape(prompts, kv_heads, rows // prompts, -1, *x.shape[3:]).swapaxes(1, 2) for x in part)
    else:  # keys are not copied for the rows: an axis that they lack is one of the kernel's grid
        part = jax.vmap(lambda q, start: _part(q, cache, start, stop, sm_scale, interpret), 1, 1)(
            by_prompt, spans.shared_start
        )
    mixed, largest, total = (x.reshape(rows, kv_heads, *x.shape[3:]) for x in part)
    return mixed, largest, total


def _part(
    queries: Float[Array, "B KV M hd"],
    cache: LayerCache,
    start: Int[Array, " B"] | None,
    stop: Int[Array, " B"],
    sm_scale: float,
    interpret: bool,
) -> tuple[Float[Array, "B KV M hd"], Float[Array, "B KV M"], Float[Array, "B KV M"]]:
    """The average over slots not yet divided, the largest score, the sum of weights."""
    batch, kv_heads, heads, width = queries.shape
    slots, dtype = cache.keys.shape[2], cache.keys.dtype
    start = jnp.zeros_like(stop) if start is None else start
    mixed, (total, largest) = _mqa()(
        *(x.reshape(batch * kv_heads, *x.shape[2:]) for x in (queries.astype(dtype), *cache)),
        *(jnp.repeat(jnp.clip(x, 0, slots), kv_heads) for x in (start, stop)),
        sm_scale=sm_scale,
        interpret=interpret,
        return_residuals=True,
        normalize_output=False,
        **_blocks(batch * kv_heads, heads, slots, width, dtype.itemsize),
    )
    mixed = mixed.astype(jnp.float32).reshape(queries.shape)
    return mixed, largest.reshape(queries.shape[:3]), total.reshape(queries.shape[:3])


def _blocks(entries: int, heads: int, slots: int, width: int, itemsize: int) -> dict[str, int]:
    """Sizes of the kernel's blocks: query heads that share a read of the keys, slots of a step, parts of the slots.

    A step holds at most 16 KiB of keys, and as many values. A cache is split into the fewest equal parts of whole
    pieces that make PROGRAMS programs.
    """
    tall = max(16, min(64, 8192 // width, 1 << (heads - 1).bit_length()))
    pieces = slots // PIECE
    programs = entries * -(-heads // tall)
    splits = next((n for n in range(1, pieces) if pieces % n == 0 and n * programs >= PROGRAMS), pieces)
    return {"block_h": tall, "block_k": max(16, min(PIECE, 2**14 // (width * itemsize))), "k_splits": splits}
