"""One step of TRPO on a tabular policy (section B6 of online.md)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from vectors.common import floats

from alignax import trpo


def trpo_step(x, hyper, expected):
    theta, advantages = floats(x, "theta", "adv")
    states, actions = np.array(x["states"]), jnp.asarray(x["actions"])[None]
    rows = (actions, advantages[None], jnp.ones(actions.shape))

    def logits(theta):
        return theta[states][None]

    gradient = jax.grad(lambda theta: trpo.surrogate(logits(theta), *rows))(theta)
    yield gradient.ravel(), expected["gradient"]
    probe = jnp.asarray(x["probe_vector"]).reshape(theta.shape)
    image = trpo.fisher_vector_product(logits, theta, rows[2], probe, damping=0.0)
    yield image.ravel(), expected["fvp_probe_undamped"]

    solver = {"iterations": hyper["cg_iters"], "tolerance": hyper["cg_residual_tol"]}
    options = {"max_kl": hyper["max_kl"], "damping": hyper["damping"], **solver}
    found = trpo.natural_direction(logits, theta, *rows, **options)
    yield found.natural.ravel(), expected["cg_direction"]
    yield found.scale, expected["step_scale"]
    yield (found.scale * found.natural).ravel(), expected["full_step"]

    search = {"shrink": hyper["backtrack"], "backtracks": hyper["max_backtracks"]}
    accept = functools.partial(trpo.accept_improvement, kl_slack=hyper["kl_slack"])
    new, info = trpo.trpo_step(logits, theta, *rows, accept=accept, **options, **search)
    yield new, expected["new_theta"]
    yield info["expected_improvement"], expected["expected_improvement"]
    yield info["backtracks"], expected["accepted_backtracks"]
    yield info["kl"], expected["kl_after"]
    yield info["improvement"], expected["surrogate_improvement"]


ONLINE = {"trpo_step": trpo_step}
