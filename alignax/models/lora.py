"""LoRA: low-rank adapters as a parameter tree of their own, the only thing that is trained.

    adapters = lora.init(key, base, config)                               # b is 0: the model is the base, bit by bit
    update = train.make_update(lora.adapted(loss_fn, config), optimizer)  # TrainState.create(adapters, optimizer)
    state, metrics = update(state, batch, {"base": base}, hyper)
    samples = sampling.generate(model, lora.combine(base, state.params, config), ...)
    hf.save(folder, model, lora.merge(base, state.params, config))        # or only the adapters: io.peft.save

A tree of adapters holds the targets only, {"layers": {"attn": {"q": {"lora_a": [L, in, r], "lora_b": [L, r, out]}}}},
float32. `combine` lays it beside the kernels of the base without any arithmetic worth mentioning, and the projections
of the shipped transformer (`alignax.models.linear`) add x a b themselves, whether layers are scanned or not. Decoding
merges once, by `Model.unroll`.

See "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al. (https://arxiv.org/abs/2106.09685).
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignax.models import linear
from alignax.models.linear import LINEAR
from alignax.types import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """What adapters are: W + scale a b, scale = alpha / rank.

    See also "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", Kalajdzievski
    (https://arxiv.org/abs/2312.03732), and "DoRA: Weight-Decomposed Low-Rank Adaptation", Liu et al.
    (https://arxiv.org/abs/2402.09353).
    """

    rank: int = 16
    alpha: int | float = 32.0
    dropout: int | float = 0.0  # the probability that an entry of what enters the adapters is 0, where there is a key
    targets: str = LINEAR  # a regex found in the paths of kernels: "layers/attn/(q|v)/kernel"
    full: str | None = None  # a regex of other parameters, trained as they are: "score/kernel", a reward model's head
    rslora: bool = False  # the scale is alpha / sqrt(rank)
    dora: bool = False  # each column of W + scale a b has a length that is trained, "lora_magnitude" [L, out]

    def __post_init__(self):
        """Refuses numbers out of range."""
        if self.rank < 1:
            raise ValueError(f"LoraConfig: rank={self.rank}; expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"LoraConfig: alpha={self.alpha}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoraConfig: dropout={self.dropout}; expected a probability, 0 or more and less than 1")

    @property
    def scale(self) -> float:
        """What a b is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def init(key: Array, base: Params, config: LoraConfig) -> Params:
    """Adapters of the kernels that `config.targets` names, which change nothing yet.

    a is uniform in +-1 / sqrt(in), as in the PEFT library, b is 0, DoRA's magnitude the norm of each column. The values
    of a target depend on the key and its path alone. `base` may be shapes (`jax.eval_shape`), for DoRA and
    `full` within `jax.eval_shape` only.

    Raises:
      ValueError: for targets that match no parameter, or one that is not the kernel of a linear projection in a layer:
        embeddings, heads, norms, experts; for `full` that matches nothing or a target.
    """
    leaves = dict(_leaves(base))
    targets, full = _targets(leaves, config), _full(leaves, config)
    found: dict[str, Any] = {path: jnp.array(leaves[path]) for path in full}  # copies: a train state may be donated
    for path in targets:
        *lead, inner, outer = leaves[path].shape
        bound, own = inner**-0.5, _own_key(key, path)
        beside = path.removesuffix("kernel")
        found[beside + "lora_a"] = jax.random.uniform(own, (*lead, inner, config.rank), minval=-bound, maxval=bound)
        found[beside + "lora_b"] = jnp.zeros((*lead, config.rank, outer))
        if config.dora:
            found[beside + "lora_magnitude"] = linear.column_norms(linear.dequantised(leaves[path]))
    return _nested(found)


def combine(base: Params, adapters: Params, config: LoraConfig, key: Array | None = None) -> Params:
    """Parameters for the model: the base's, with the adapters beside their kernels and the scale in b.

    key: of dropout, a key for every layer and target made of it; None: no dropout, as for everything but training.

    Raises:
      ValueError: naming a path, when the adapters do not fit the base or `config`.
    """
    check(base, adapters, config)
    leaves, found = dict(_leaves(base)), {}
    for path, leaf in _leaves(adapters):
        folder, _, name = path.rpartition("/")
        found[path] = leaf * config.scale if name == "lora_b" else leaf
        if name == "lora_a" and key is not None and config.dropout:
            lead = leaf.shape[:-2]
            found[f"{folder}/lora_key"] = jax.random.split(_own_key(key, f"{folder}/kernel"), lead)
            found[f"{folder}/lora_rate"] = jnp.full(lead, config.dropout)
    return _nested(leaves | found)


def check(base: Params, adapters: Params, config: LoraConfig) -> None:
    """That the adapters are those that `init` makes for this base, arrays or shapes.

    Raises:
      ValueError: naming a path.
    """
    leaves = dict(_leaves(base))
    if has := [path for path in leaves if path.endswith("/lora_a")]:
        raise ValueError(f"LoRA: the base has adapters already, {has}; expected parameters without")
    expected = {path: tuple(leaves[path].shape) for path in _full(leaves, config)}
    for path in _targets(leaves, config):
        *lead, inner, outer = leaves[path].shape
        beside = path.removesuffix("kernel")
        expected[beside + "lora_a"] = (*lead, inner, config.rank)
        expected[beside + "lora_b"] = (*lead, config.rank, outer)
        if config.dora:
            expected[beside + "lora_magnitude"] = (*lead, outer)
    found = _shapes(adapters)
    if different := sorted(found.keys() ^ expected.keys()):
        raise ValueError(
            f"LoRA: only one of the adapters and what config asks for on this base has {different[:8]}; "
            "expected the adapters that init makes"
        )
    for path, shape in expected.items():
        if found[path] != shape:
            raise ValueError(f"LoRA: adapters have {path!r} of shape {found[path]}; the base expects {shape}")


def merge(base: Params, adapters: Params, config: LoraConfig) -> Params:
    """The base with the adapters added to its kernels, for export: float32 arithmetic, the dtypes of the base.

    Quantised kernels become floats.

    Raises:
      ValueError: as `combine`.
    """
    return linear.merged(combine(base, adapters, config), quantised=True)


def adapted(fn: Callable[..., Any], config: LoraConfig, *, reference: bool = True) -> Callable[..., Any]:
    """A loss function, or a statistics function, of all parameters as one of the adapters, for `train.make_update`.

    The new function wants `frozen["base"]`, constants to differentiation, and passes on the other entries of `frozen`.
    `hyper["dropout_key"]`, which is not passed on, switches dropout on; fold the step into it. The masks differ between
    micro-batches and devices, since what the rows hold is folded in too.

    Args:
      fn: `(params, batch, frozen, hyper) -> ...`; its attributes, such as `whole_batch`, are kept.
      config: of the adapters.
      reference: whether the base is `frozen["reference"]` where the caller gives none: the model without its adapters.

    Raises:
      ValueError: when called without a base, or with adapters that do not fit it.
    """

    @functools.wraps(fn)
    def with_base(adapters: Params, batch: Any, frozen: Any, hyper: Mapping[str, Any]) -> Any:
        if not (isinstance(frozen, dict) and "base" in frozen):
            found = sorted(frozen) if isinstance(frozen, dict) else type(frozen).__name__
            raise ValueError(f"adapted: frozen is {found}; expected {{'base': params}}, of the model without adapters")
        base, hyper = jax.lax.stop_gradient(frozen["base"]), dict(hyper or {})
        others = {name: value for name, value in frozen.items() if name != "base"}
        if reference:
            others = {"reference": base} | others
        key = hyper.pop("dropout_key", None)
        if key is not None:
            key = jax.random.fold_in(key, _checksum(batch))
        return fn(combine(base, adapters, config, key), batch, others or None, hyper)

    return with_base


def average(adapters: Sequence[Params], config: LoraConfig) -> tuple[Params, LoraConfig]:
    """One set of adapters whose scale a b is exactly the mean of those given, and its configuration; full ones too.

    The ranks lie behind one another: a = [a_1 ... a_n], b = [b_1; ...; b_n] / n, at the scale of `config`. BPO samples
    from, and keeps close to, an ensemble of adapters on one base that are trained apart: see "BPO: Staying Close to
    the Behavior LLM Creates Better Online LLM Alignment", Xu et al. (https://arxiv.org/abs/2406.12168).

    Raises:
      ValueError: for no adapters, trees that differ, and DoRA, where the mean of the models has no such form.
    """
    if config.dora:
        raise ValueError("average: dora=True; expected adapters without magnitudes, whose changes add up")
    if not adapters or any(_shapes(other) != _shapes(adapters[0]) for other in adapters):
        raise ValueError(f"average: {len(adapters)} trees of adapters; expected at least one, and all of one form")
    count = len(adapters)

    def mean(path: str, *leaves: Array) -> Array:
        if path.endswith("/lora_a"):
            return jnp.concatenate(leaves, axis=-1)
        if path.endswith("/lora_b"):
            return jnp.concatenate(leaves, axis=-2) / count
        return jnp.mean(jnp.stack(leaves), axis=0, dtype=jnp.float32).astype(leaves[0].dtype)

    flat = [dict(_leaves(tree)) for tree in adapters]
    found = {path: mean(path, *(tree[path] for tree in flat)) for path in flat[0]}
    alpha = config.alpha * (count**0.5 if config.rslora else count)
    return _nested(found), dataclasses.replace(config, rank=config.rank * count, alpha=alpha)


def _targets(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    found = [path for path in leaves if re.search(config.targets, path)]
    kernels = [path for path in leaves if re.search(LINEAR, path)]
    if not found:
        raise ValueError(f"LoRA: targets {config.targets!r} match no parameter; expected some of {kernels}")
    if unfit := [path for path in found if path not in kernels]:
        raise ValueError(
            f"LoRA: targets {config.targets!r} match {unfit}; expected kernels of linear projections only: {kernels}"
        )
    return found


def _full(leaves: Mapping[str, Any], config: LoraConfig) -> list[str]:
    if config.full is None:
        return []
    found = [path for path in leaves if re.search(config.full, path)]
    if not found:
        raise ValueError(f"LoRA: full {config.full!r} matches no parameter; expected some of {sorted(leaves)}")
    if twice := set(found) & set(_targets(leaves, config)):
        raise ValueError(f"LoRA: full {config.full!r} and targets {config.targets!r} both match {sorted(twice)}")
    return found


def _leaves(tree: Params, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and leaves of nested dicts; whatever is no dict is a leaf."""
    for name, part in tree.items():
        if isinstance(part, dict):
            yield from _leaves(part, f"{path}{name}/")
        else:
            yield path + name, part


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        functools.reduce(lambda part, folder: part.setdefault(folder, {}), folders, tree)[name] = leaf
    return tree


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree)}


def _own_key(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _checksum(batch: Any) -> Array:
    """A number that tells the rows of one micro-batch from those of another."""
    leaves = (jnp.asarray(leaf) for leaf in jax.tree.leaves(batch))
    whole = (leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.integer))
    return sum((jnp.sum(leaf.astype(jnp.uint32)) for leaf in whole), jnp.uint32(0))
