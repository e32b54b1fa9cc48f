"""What is particular to DPO of denoising errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, by_position, real
from references import diffusion as references

from alignax import losses

ERRORS = [jnp.array([x]) for x in (0.121, 0.119, 0.1215, 0.1188)]


def test_the_same_errors_twice_are_log_2_and_shifts_do_not_matter():
    same = jnp.array([0.1])
    np.testing.assert_allclose(losses.diffusion_dpo(same, same, same, same), math.log(2), rtol=1e-6)
    shifted = [x + 0.25 for x in ERRORS]
    np.testing.assert_allclose(losses.diffusion_dpo(*shifted), losses.diffusion_dpo(*ERRORS), rtol=1e-2)


def test_the_gradient_lowers_the_error_of_the_chosen_side_only():
    chosen, rejected, *reference = jax.grad(lambda x: losses.diffusion_dpo(*x, beta=100.0).sum())(ERRORS)
    inside = -50 * ((0.121 - 0.119) - (0.1215 - 0.1188))
    np.testing.assert_allclose(chosen, 50 / (1 + math.exp(inside)), rtol=1e-5)
    np.testing.assert_allclose(rejected, -chosen, rtol=1e-6)
    np.testing.assert_array_equal(reference, 0.0)
    with pytest.raises(ValueError, match="diffusion_dpo: beta=0; expected beta > 0"):
        losses.diffusion_dpo(*ERRORS, beta=0.0)


def test_an_image_is_one_sample():
    image = jnp.arange(24.0).reshape(2, 3, 2, 2)
    np.testing.assert_allclose(losses.squared_error(image, image + 2.0), [4.0, 4.0])
    np.testing.assert_array_equal(jax.grad(lambda t: losses.squared_error(image, t).sum())(image + 2.0), 0.0)


NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected")


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "diffusion_dpo": Row(
            losses.diffusion_dpo,
            by_position(losses.diffusion_dpo, *NAMES),
            references.diffusion_dpo,
            {name: Input("B", None, not name.startswith("ref"), real) for name in NAMES},
            {"beta": 0.8},
        ),
        "squared_error": Row(
            losses.squared_error,
            by_position(losses.squared_error, "prediction", "target"),
            references.squared_error,
            {"prediction": Input("B T", None, True, real), "target": Input("B T", None, make=real)},
        ),
    }
