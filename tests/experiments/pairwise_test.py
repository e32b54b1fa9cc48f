"""Every pairwise objective by its name."""

import jax.numpy as jnp
import pairwise
import pytest

from alignax import losses, train


@pytest.mark.parametrize("name", pairwise.OBJECTIVES)
def test_an_objective_takes_two_sides_and_its_defaults(name):
    objective = pairwise.objective(name)
    pairwise.try_out(objective.loss, {})
    sums = ("cpo", "cpo_token_nll", "slic_hf")  # their rewards are of whole sequences without a reference
    assert objective.reference or objective.reward is not pairwise.preference.whole or name in sums


def test_every_pairwise_loss_of_the_library_has_a_name():
    offered = {id(pairwise.underlying(objective.loss)) for objective in pairwise.OBJECTIVES.values()}
    made_online = {losses.xpo, losses.p3o_joint, losses.p3o_separate, losses.p3o_gap}  # of samples of the policy itself
    missing = [
        name
        for name, loss in vars(losses).items()
        if pairwise.is_pairwise(loss) and id(loss) not in offered and loss not in made_online
    ]
    assert not missing


@pytest.mark.parametrize("name", ["dpo", "hinge", "robust_dpo", "nca_pair", "exo_pair"])
@pytest.mark.parametrize("divergence", pairwise.DIVERGENCES)
def test_divergences_are_orthogonal(name, divergence):
    pairwise.try_out(pairwise.objective(name, divergence=divergence, wpo=True).loss, {"beta": 0.3})


def test_schedules():
    class Config:
        reference, reference_every, reference_rate = "hard", 3, 0.5

    old, new = jnp.zeros(2), jnp.ones(2)
    assert train.ema_every(old, new, 3, **pairwise.schedule(Config))[0] == 1
    Config.reference = "soft"
    assert train.ema_every(old, new, 3, **pairwise.schedule(Config))[0] == 0.5
    assert train.ema_every(old, new, 4, **pairwise.schedule(Config))[0] == 0
    Config.reference = "ema"
    assert train.ema_every(old, new, 4, **pairwise.schedule(Config))[0] == 0.5
