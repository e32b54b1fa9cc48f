"""What `--lora-rank` of the scripts does: adapters of low rank are trained, the weights are held once, as they were."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import checks
import jax
import records

from alignax.io import hf, peft
from alignax.models import LoraConfig, lora
from alignax.train import TrainState
from alignax.types import Params

_OWN = 2**31  # beyond all steps, of whose keys those of the adapters are none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Low-rank adapters (LoRA): fields of a Config."""

    lora_rank: int = 0
    """Train adapters of this rank, on weights that stay as they are and are the reference too; 0 trains the weights.
    OUTPUT/adapter then has the adapters, a folder of the PEFT library, and OUTPUT/model the weights with them."""
    lora_alpha: float = 32.0
    """The adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Probability that an entry of what enters the adapters is left out, in updates."""
    lora_targets: str | None = None
    """A regex found in the paths of the kernels to adapt, such as "attn/(q|v)/kernel"; unless given, all projections of
    the layers."""


class Adapters(NamedTuple):
    """How a script trains: adapters of a base, or without a `config` all weights."""

    config: LoraConfig | None = None
    base: Params | None = None
    key: jax.Array | None = None
    reference: bool = False  # whether the loss reads the base as its reference
    exports: bool = True  # whether the adapters have a form in the PEFT library

    def initial(self, params: Params) -> Params:
        """What the train state begins with, given the weights."""
        if self.config is None or self.key is None:
            return params
        return lora.init(jax.random.fold_in(self.key, 0), params, self.config)

    def loss(self, function: Callable | None) -> Any:
        """A loss or statistics function of all weights as one of what is trained; None stays None."""
        if self.config is None or function is None:
            return function
        return lora.adapted(function, self.config, reference=self.reference)

    def frozen(self, others: Mapping[str, Params] | None = None) -> Mapping[str, Params] | None:
        """What an update or a measurement reads beside what is trained, `others` without adapters."""
        return others if self.base is None else {"base": self.base}

    def hyper(self, hyper: Mapping[str, Any], state: TrainState) -> dict[str, Any]:
        """The hyperparameters of the state's next update, with the key of dropout."""
        if self.config is None or self.key is None or not self.config.dropout:
            return dict(hyper)
        return {**hyper, "dropout_key": jax.random.fold_in(jax.random.fold_in(self.key, 1), state.step)}

    def whole(self, trained: Params) -> Params:
        """The weights to sample with, of what is trained."""
        if self.config is None or self.base is None:
            return trained
        return lora.combine(self.base, trained, self.config)

    def save(self, output: pathlib.Path, loaded: hf.Loaded, trained: Params, name: str) -> None:
        """Writes OUTPUT/model, and OUTPUT/adapter for the base of this name."""
        if self.config is None or self.base is None:
            return hf.save(records.cleared(output / "model"), loaded.model, trained, loaded.tokenizer)
        if self.exports:
            peft.save(records.cleared(output / "adapter"), loaded.model, trained, self.config, base_name=name)
        merged = lora.merge(self.base, trained, self.config)
        return hf.save(records.cleared(output / "model"), loaded.model, merged, loaded.tokenizer)


def check(config: Any, *, moves: str = "") -> LoraConfig | None:
    """The adapters that a Config asks for, None if none.

    Args:
      config: a script's, with the fields of `Options`.
      moves: the option that lets the reference move, and its value; empty where it does not.

    Raises:
      ValueError: for numbers out of range, options of adapters that there are not, and a reference that moves: it is
        the base, which does not.
    """
    checks.check_ranges(config, least={"lora_rank": 0})
    if not config.lora_rank:
        given = [f.name for f in dataclasses.fields(Options) if getattr(config, f.name) != f.default]
        if given:
            raise ValueError(f"{given} with lora_rank=0, which has no adapters; expected a rank of 1 or more")
        return None
    if moves:
        raise ValueError(f"{moves} with lora_rank={config.lora_rank}: the reference is the base; expected a fixed one")
    options = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    return LoraConfig(**options, **({} if config.lora_targets is None else {"targets": config.lora_targets}))


def arrange(config: Any, loaded: hf.Loaded, *, reference: bool = False) -> Adapters:
    """How to train the model that was loaded; prints how many numbers that are.

    `reference`: whether the loss computes what its reference says.

    Raises:
      ValueError: for targets that are no projections of the model's layers.
    """
    chosen = check(config)
    if chosen is None:
        return Adapters()
    key = jax.random.fold_in(jax.random.key(config.seed), _OWN)
    found = Adapters(chosen, loaded.params, key, reference)
    trained, size = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (_shapes(found), loaded.params))
    print(f"adapters: {trained} numbers are trained, {trained / size:.2%} of the model's {size}")
    try:
        peft.check(loaded.model, chosen)
    except ValueError as error:
        print(f"adapters: only OUTPUT/model is written, not OUTPUT/adapter ({error})")
        return found._replace(exports=False)
    return found


def _shapes(found: Adapters) -> Params:
    return jax.eval_shape(found.initial, found.base)
