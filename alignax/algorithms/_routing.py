"""What a router adds to the loss of any algorithm."""

from collections.abc import Callable, Mapping
from typing import Any

from alignax import losses
from alignax.algorithms._fillers import blank
from alignax.types import Array, Mean, Model, Params, Scalar, Term


def router_terms(aux: Mapping[str, Array], weights: Mapping[str, Any]) -> dict[str, Term]:
    """The auxiliary losses of a mixture of experts as terms, those whose weight is None left out.

    weights: "aux_weight", "z_weight", and "expert_load", None unless it is known over the whole batch.
    """
    terms = {}
    if weights["aux_weight"] is not None:
        balance = losses.load_balancing(aux, weights["expert_load"])
        terms["load_balancing"] = Term(weights["aux_weight"], balance)
    if weights["z_weight"] is not None:
        terms["router_z"] = Term(weights["z_weight"], losses.router_z(aux))
    return terms


def expert_load(model: Model) -> Callable[..., dict[str, Mean]]:
    """Makes the `statistics` of `make_update` under which the load-balancing loss is that of the whole batch.

    Without it each micro-batch is balanced by itself. It costs one more forward pass.
    """

    def statistics(params: Params, batch: Any, frozen: Any, hyper: dict[str, Scalar]) -> dict[str, Mean]:
        del frozen, hyper
        batch = blank(batch)
        length = batch.tokens.shape[-1]
        rows = batch.tokens.reshape(-1, length), batch.segments.reshape(-1, length)
        return {"expert_load": losses.mean_load(model.hidden(params, *rows).aux)}

    return statistics
