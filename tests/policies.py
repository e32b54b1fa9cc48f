"""What the tests of policy losses share: their inputs, and gradients of which a part is a constant."""

from functools import partial

import numpy as np
from properties import CONSTANT, LOGP, SIZES, Input, Properties, Row, make, real

POLICY = {"logp": LOGP, "old_logp": CONSTANT, "advantages": Input(make=real)}


def sample(inputs=POLICY, **options):
    """Random inputs as numpy arrays, masks beside them."""
    return make(Row(None, None, None, inputs), **options)


def fixed(loop, inputs=POLICY):
    """The loop, its constants those of the point where the harness differentiates."""
    x = sample(inputs, seed=1)
    return partial(loop, at={n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in x.items()})


class Rounded(Properties):
    """Sums of products, whose last bit depends on which of them the compiler fuses for a length."""

    rows = {}  # noqa: RUF012

    def test_padding(self, row, run):
        x = make(row)

        def resized(x, width):
            return np.pad(x, [(0, 0), (0, width)]) if x.ndim == 2 else x

        value, gradients = run(x)
        padded, longer = run({name: resized(array, 3) for name, array in x.items()})
        np.testing.assert_allclose(padded[:, : SIZES["T"]] if padded.ndim == 2 else padded, value, rtol=1e-6)
        for name, gradient in gradients.items():
            same = longer[name][:, : SIZES["T"]] if gradient.ndim == 2 else longer[name]
            np.testing.assert_allclose(same, gradient, rtol=1e-6, atol=1e-7, err_msg=name)
