"""What is particular to pairwise losses: closed forms, outside vectors, refusals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Properties, Row, pairwise
from references import preference as references

from alignax import losses
from alignax.types import Response


def side(logp, ref_logp):
    """Responses of one token each, whose log-probabilities are the sums of whole sequences."""
    logp, ref_logp = (jnp.asarray(x, jnp.float32)[:, None] for x in (logp, ref_logp))
    return Response(logp, ref_logp, jnp.ones(logp.shape, bool))


def test_dpo_on_three_pairs():
    # x_chosen - x_rejected = 1.5, -3.5, 3.75; the numbers are those of TRL's and of the paper's authors' code
    chosen, rejected = side([-12.0, -35.5, -8.25], [-13.0, -34.0, -10.0]), side([-14, -33, -20], [-13.5, -35, -18])
    np.testing.assert_allclose(losses.dpo(chosen, rejected), [0.6209570478, 0.8833821554, 0.5231232641], rtol=1e-6)
    smoothed = losses.dpo(chosen, rejected, label_smoothing=0.3)
    np.testing.assert_allclose(smoothed, [0.665957, 0.778382, 0.635623], atol=2e-6)


def test_dpo_at_the_reference_is_log_2_and_shifts_do_not_matter():
    same = side([-20.0], [-20.0])
    np.testing.assert_allclose(losses.dpo(same, same), math.log(2), rtol=1e-6)
    chosen, rejected = side([-3.0], [-4.0]), side([-5.0], [-4.5])
    shifted = losses.dpo(side([-3.0 + 7], [-4.0 + 7]), rejected)
    np.testing.assert_allclose(shifted, losses.dpo(chosen, rejected), rtol=1e-6)
    swapped = losses.dpo(rejected, chosen)  # log sigmoid(z) - log sigmoid(-z) = z
    np.testing.assert_allclose(swapped - losses.dpo(chosen, rejected), 0.1 * 1.5, rtol=1e-5)


def test_the_reference_is_a_constant():
    def loss(ref):
        return jnp.sum(losses.dpo(side([-3.0], ref), side([-5.0], ref)))

    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([-4.0])), [0.0])


def test_without_a_reference():
    free = Response(jnp.array([[-3.0]]), None, jnp.ones((1, 1)))
    other = Response(jnp.array([[-5.0]]), None, jnp.ones((1, 1)))
    np.testing.assert_allclose(losses.dpo(free, other, beta=0.5), math.log1p(math.exp(-1)), rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.5, -0.1, 1, jnp.float32(0.9)])
def test_label_smoothing_out_of_range_is_refused(label_smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing=.*expected 0 <= label_smoothing < 0.5"):
        losses.dpo(side([-1.0], [-1.0]), side([-2.0], [-2.0]), label_smoothing=label_smoothing)


def spread(total, ref_total, lengths):
    """Responses of the given lengths, their sums spread evenly over the tokens."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    logp, ref_logp = (np.where(mask, (np.array(x) / lengths)[:, None], 0) for x in (total, ref_total))
    return Response(jnp.asarray(logp, jnp.float32), jnp.asarray(ref_logp, jnp.float32), jnp.asarray(mask))


def ours(vector):
    """The loss a vector speaks of, with its hyperparameters under our names; None for what is not built."""
    hyper = dict(vector["hyperparameters"])
    hyper.pop("reference_free", None)
    if vector["loss"] in ("dpo", "cdpo") and "sample_weight" not in vector["inputs"]:
        return losses.dpo, hyper
    if vector["loss"] == "ipo":
        return losses.ipo_average if hyper["length_normalize"] else losses.ipo, {"beta": hyper["tau"]}
    return None, hyper


def test_vectors(shared):
    used = 0
    for vector in json.loads((shared / "spec" / "vectors_preference.json").read_text()):
        loss, hyper = ours(vector)
        if loss is None:
            continue
        x, zeros = vector["inputs"], [0.0] * len(vector["inputs"]["chosen_logps"])
        chosen, rejected = (
            spread(x[f"{side}_logps"], x.get(f"ref_{side}_logps", zeros), x.get(f"{side}_lens", [1] * len(zeros)))
            for side in ("chosen", "rejected")
        )
        per_example = vector["expected"]["per_example"]
        np.testing.assert_allclose(loss(chosen, rejected, **hyper), per_example, 1e-5, 1e-5, err_msg=vector["id"])
        used += 1
    assert used == 10


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "dpo": Row(losses.dpo, pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.5}),
        "cdpo": Row(losses.dpo, pairwise(losses.dpo), references.dpo, PAIR, {"beta": 0.2, "label_smoothing": 0.3}),
        "ipo": Row(losses.ipo, pairwise(losses.ipo), references.ipo, PAIR, {"beta": 0.3}),
        "ipo_average": Row(
            losses.ipo_average, pairwise(losses.ipo_average), references.ipo_average, PAIR, {"beta": 0.3}
        ),
    }
