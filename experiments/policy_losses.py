"""The policy losses by name, and what a script is told about one."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import checks
import jax.numpy as jnp

from alignax import losses

PolicyLoss = Literal[
    "ppo_clip", "ppo_penalty", "ppo_hybrid", "reinforce", "reinforce_is_token", "reinforce_is_sequence", "rloo", "gspo",
    "gspo_token", "cispo", "cispo_range", "gmpo", "sapo", "vespo", "luspo",
]  # fmt: skip
POLICY_LOSSES: dict[str, Callable] = {name: getattr(losses, name) for name in get_args(PolicyLoss)}


def hyperparameters(name: str, hyper: Mapping[str, float], **flags: float | None) -> dict[str, float]:
    """The numbers of a policy loss, from `--hyper` and flags of their own; None is as the loss was published.

    They are tried once: inside an update they are traced, and the loss could refuse nothing.

    Raises:
      ValueError: for a name that the loss does not have, or a number that it refuses.
    """
    loss = POLICY_LOSSES[name]
    found = checks.merge_hyper(hyper, flags, checks.keywords(loss), f"--policy-loss {name}")
    x = -jnp.ones((2, 1))
    loss(x, x, x, x != 0, **found)
    return found


def check(name: str, epochs: int, minibatches: int) -> None:
    """Refuses a loss that holds for samples of the policy as it is, where a rollout makes more than one update.

    Raises:
      ValueError: naming the loss and the updates.
    """
    if POLICY_LOSSES[name] is losses.reinforce and epochs * minibatches > 1:
        raise ValueError(
            f"--policy-loss {name} with epochs={epochs}, minibatches={minibatches}: it knows no ratio to the policy "
            "that sampled; expected 1 of each, or reinforce_is_token"
        )
