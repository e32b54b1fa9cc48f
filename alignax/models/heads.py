"""A scalar head over any `Model`: what makes a reward model, a critic, or a policy that is its own critic."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Hidden, Model, Params


def with_score(model: Model) -> Model:
    """The model with a scalar per state: `values = states @ kernel`, float32.

    Parameters are `{"backbone": those of the model, "score": {"kernel": [D, 1]}}`. `init` leaves out the backbone's
    language-model head ("head"), which a reward model and a critic of their own never use; where the policy is its own
    critic it stays (see `add_score`), and `logits` work as before.

    Raises:
      ValueError: when parameters without a scalar head reach `values`, or the model has one already.
    """
    if model.values is not None:
        raise ValueError("with_score: the model already has a scalar head")

    def init(key: Array) -> Params:
        backbone_key, score_key = jax.random.split(key)
        return add_score(model, model.init(backbone_key), score_key)

    def hidden(params: Params, *rows: Array, **options: Any) -> Hidden:
        return model.hidden(_part(params, "backbone"), *rows, **options)

    def logits(params: Params, states: Array) -> Array:
        return model.logits(_part(params, "backbone"), states)

    def values(params: Params, states: Float[Array, "... D"]) -> Float[Array, "..."]:
        kernel = _part(params, "score")["kernel"].astype(states.dtype)
        return jnp.matmul(states, kernel, preferred_element_type=jnp.float32)[..., 0]

    def unroll(params: Params) -> Params:
        return params | {"backbone": model.unroll(_part(params, "backbone"))} if model.unroll else params

    return model._replace(init=init, hidden=hidden, logits=logits, values=values, unroll=unroll)


def add_score(model: Model, params: Params, key: Array | None = None, *, keep_head: bool = False) -> Params:
    """Parameters for `with_score(model)` from those of `model`.

    Args:
      model: the model without a scalar head.
      params: its parameters, not copied.
      key: of the new head, normal with standard deviation 1 / sqrt(D + 1), as reward models begin; None: zeros, as
        the value head of a policy that is its own critic begins. See "Fine-Tuning Language Models from Human
        Preferences", Ziegler et al. (https://arxiv.org/abs/1909.08593).
      keep_head: whether the language-model head stays: for a policy that is its own critic.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    states = jax.eval_shape(model.hidden, params, tokens, tokens + 1).states
    shape = (states.shape[-1], 1)
    kernel = jnp.zeros(shape) if key is None else jax.random.normal(key, shape) / (shape[0] + 1) ** 0.5
    if isinstance(params, dict) and not keep_head:
        params = {name: value for name, value in params.items() if name != "head"}
    return {"backbone": params, "score": {"kernel": kernel.astype(_dtype(params))}}


def _dtype(params: Params) -> Any:
    return jnp.result_type(*jax.tree.leaves(params))


def _part(params: Params, name: str) -> Params:
    if not (isinstance(params, dict) and set(params) == {"backbone", "score"}):
        found = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(
            f"a model with a scalar head got parameters {found}; expected 'backbone' and 'score', as from add_score"
        )
    return params[name]
