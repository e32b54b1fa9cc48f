"""DPO where log-probabilities are out of reach, and errors of denoising stand for them: arrays `[B]` in, `[B]` out."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.types import Array, Scalar


def diffusion_dpo(
    error_chosen: Float[Array, " B"],
    error_rejected: Float[Array, " B"],
    ref_error_chosen: Float[Array, " B"],
    ref_error_rejected: Float[Array, " B"],
    *,
    beta: Scalar = 5000.0,
) -> Float[Array, " B"]:
    """Diffusion-DPO: -log sigmoid(-beta / 2 ((e_chosen - e_rejected) - (e_ref_chosen - e_ref_rejected))).

    e is the squared error of the predicted noise (`squared_error`); the four of a pair share one draw of noise and one
    timestep, uniform. See "Diffusion Model Alignment Using Direct Preference Optimization", Wallace et al.
    (https://arxiv.org/abs/2311.12908), eq. 14: beta takes in its T and weighting, and the half is that of the authors'
    code.

    Args:
      error_chosen, error_rejected: `[B]`, of the policy.
      ref_error_chosen, ref_error_rejected: `[B]`, of the reference, constants.
      beta: how strongly the reference holds (paper: beta; 5000 in the authors' code).

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("diffusion_dpo", beta=beta)
    arrays = (error_chosen, error_rejected, ref_error_chosen, ref_error_rejected)
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    chosen, rejected, ref_chosen, ref_rejected = (x.astype(jnp.float32) for x in arrays)
    gap = chosen - rejected - jax.lax.stop_gradient(ref_chosen - ref_rejected)
    return -jax.nn.log_sigmoid(-beta / 2 * gap)


def squared_error(prediction: Float[Array, "B ..."], target: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Squared error of a sample: mean((prediction - target)^2) over all axes but the first.

    Of noise or of velocity, whichever the model predicts; what `diffusion_dpo` reads. See "Diffusion Model Alignment
    Using Direct Preference Optimization", Wallace et al. (https://arxiv.org/abs/2311.12908).

    Args:
      prediction: `[B, ...]`.
      target: `[B, ...]`, a constant.
    """
    chex.assert_equal_shape([prediction, target])
    error = prediction.astype(jnp.float32) - jax.lax.stop_gradient(target.astype(jnp.float32))
    return jnp.mean(error.reshape(error.shape[0], -1) ** 2, axis=1)
