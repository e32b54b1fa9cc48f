"""Router losses against the sums of their papers, and over parts of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.types import Mean

LAYERS, EXPERTS, CHOSEN = 3, 5, 2


def routed(tokens, seed):
    """Logits of a router and the sums that a mixture keeps of them."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (LAYERS, tokens, EXPERTS))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits)[..., :CHOSEN]
    aux = {
        "expert_tokens": np.stack([np.bincount(layer.reshape(-1), minlength=EXPERTS) for layer in chosen]),
        "expert_probs": probs.sum(1),
        "router_z": (np.log(np.exp(logits).sum(-1)) ** 2).sum(1),
        "router_rows": np.asarray(LAYERS * tokens),
    }
    return probs, chosen, {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}


def balance(probs, chosen):
    """E sum_e f_e P_e, counted token by token."""
    rows = probs.shape[0] * probs.shape[1]
    shares = [sum(e in token for layer in chosen for token in layer) / rows for e in range(EXPERTS)]
    means = [sum(token[e] for layer in probs for token in layer) / rows for e in range(EXPERTS)]
    return EXPERTS * sum(f * p for f, p in zip(shares, means))


def test_load_balancing_equals_its_sum():
    probs, chosen, aux = routed(11, 0)
    np.testing.assert_allclose(losses.load_balancing(aux).value(), balance(probs, chosen), rtol=1e-6)
    np.testing.assert_allclose(losses.mean_load(aux).value().sum(), CHOSEN, rtol=1e-6)


def test_even_routing_costs_k_and_one_expert_for_all_costs_e():
    even = {
        "expert_tokens": jnp.full((1, 4), 6.0),
        "expert_probs": jnp.full((1, 4), 3.0),
        "router_rows": jnp.asarray(12.0),
    }
    np.testing.assert_allclose(losses.load_balancing(even).value(), 2.0, rtol=1e-6)
    one = jnp.asarray([[12.0, 0, 0, 0]])
    np.testing.assert_allclose(losses.load_balancing({**even, "expert_tokens": one, "expert_probs": one}).value(), 4.0)


def test_only_probabilities_have_a_gradient():
    _, _, aux = routed(11, 0)
    gradient = jax.grad(lambda aux: losses.load_balancing(aux).total)(aux)
    load = np.asarray(aux["expert_tokens"]).sum(0) / (LAYERS * 11)
    np.testing.assert_allclose(gradient["expert_probs"], np.stack([EXPERTS * load] * LAYERS), rtol=1e-6)
    np.testing.assert_array_equal(gradient["expert_tokens"], 0)


def test_parts_add_up_when_the_load_is_that_of_the_whole():
    parts = [routed(tokens, seed) for seed, tokens in enumerate((4, 9))]
    probs, chosen = (np.concatenate([np.asarray(part[i]) for part in parts], axis=1) for i in (0, 1))
    loads = [losses.mean_load(part[2]) for part in parts]
    load = Mean(loads[0].total + loads[1].total, loads[0].count + loads[1].count).value()
    means = [losses.load_balancing(part[2], load) for part in parts]
    whole = Mean(means[0].total + means[1].total, means[0].count + means[1].count).value()
    np.testing.assert_allclose(whole, balance(probs, chosen), rtol=1e-6)


def test_router_z_equals_its_mean():
    probs, _, aux = routed(11, 0)
    logits = np.random.default_rng(0).normal(0, 1.5, probs.shape)
    np.testing.assert_allclose(losses.router_z(aux).value(), (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.load_balancing, losses.mean_load, losses.router_z])
def test_no_token_costs_nothing_and_no_router_is_an_error(loss):
    _, _, aux = routed(2, 0)
    empty = jax.tree.map(jnp.zeros_like, aux)
    np.testing.assert_array_equal(loss(empty).value(), 0)
    with pytest.raises(ValueError, match=r"the model has no router: its aux holds \[\]"):
        loss({})
