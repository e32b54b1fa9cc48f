"""The scripts' optimizer against AdamW written in numpy; what a run leaves on disk; plain printing."""

import dataclasses
import math

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@dataclasses.dataclass(frozen=True)
class Config:
    output: str = "unused"
    steps: int = 3


@pytest.fixture
def stacked():
    """Layers stacked along axis 0: every leaf has two axes or more, whatever it is."""
    return {
        "embed": {"embedding": jnp.full((5, 4), 0.5)},
        "layers": {
            "attention": {"q": {"kernel": jnp.full((2, 4, 6), -0.3), "bias": jnp.full((2, 6), 0.2)}},
            "norm": {"scale": jnp.full((2, 4), 1.0)},
            "q_norm": {"weight": jnp.full((2, 3), 1.0)},
            "lora": {"b": jnp.full((2, 4), 0.7)},
        },
        "head": {"kernel": jnp.full((4, 5), 0.1)},
    }


@pytest.mark.parametrize(
    "step, rate",
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (8, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))),
        (10, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.75))),
        (12, 0.1),
        (50, 0.1),
    ],
)
def test_cosine_schedule_is_the_closed_form(step, rate):
    schedule = common.make_schedule(3e-4, steps=12, warmup=4, schedule="cosine", final=0.1)
    np.testing.assert_allclose(schedule(step), 3e-4 * rate, rtol=1e-6)


def test_linear_and_constant_schedules():
    linear = common.make_schedule(2.0, steps=4, schedule="linear")
    constant = common.make_schedule(2.0, steps=4, warmup=2)
    np.testing.assert_allclose([linear(s) for s in range(5)], [2.0, 1.5, 1.0, 0.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose([constant(s) for s in range(5)], [1.0, 2.0, 2.0, 2.0, 2.0], rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup=5; expected 0 to steps=4"):
        common.make_schedule(1.0, steps=4, warmup=5)


def test_decay_mask_goes_by_name_in_a_stacked_tree(stacked):
    mask = common.decay_mask(stacked)
    assert mask == {
        "embed": {"embedding": True},
        "layers": {
            "attention": {"q": {"kernel": True, "bias": False}},
            "norm": {"scale": False},
            "q_norm": {"weight": False},
            "lora": {"b": True},
        },
        "head": {"kernel": True},
    }


def test_optimizer_equals_adamw_in_numpy(stacked):
    """Four updates with gradients on both sides of the clipping norm."""
    steps, peak, b1, b2, eps, decay, limit = 4, 0.1, 0.8, 0.9, 1e-6, 0.3, 2.0
    optimizer = common.make_optimizer(
        peak, steps=steps, warmup=2, schedule="linear", weight_decay=decay, max_grad_norm=limit, b1=b1, b2=b2, eps=eps
    )
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(stacked)
    gradients = [[scale * rng.normal(size=x.shape) for x in leaves] for scale in (0.01, 1.0, 10.0, 0.1)]

    def name(path):
        return "/".join(entry.key for entry in path)

    decayed = {"embed/embedding", "layers/attention/q/kernel", "layers/lora/b", "head/kernel"}
    decays = [name(path) in decayed for path, _ in jax.tree_util.tree_leaves_with_path(stacked)]
    expected = [np.asarray(x, np.float64) for x in leaves]
    first, second = [np.zeros_like(x) for x in expected], [np.zeros_like(x) for x in expected]
    for s, grads in enumerate(gradients):
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, limit / norm) for g in grads]
        rate = peak * min(1.0, (s + 1) / 2) * (1 - max(0, s - 2) / (steps - 2))
        for i, g in enumerate(grads):
            first[i] = b1 * first[i] + (1 - b1) * g
            second[i] = b2 * second[i] + (1 - b2) * g**2
            direction = (first[i] / (1 - b1 ** (s + 1))) / (np.sqrt(second[i] / (1 - b2 ** (s + 1))) + eps)
            expected[i] = expected[i] - rate * (direction + decay * decays[i] * expected[i])

    params, state = stacked, optimizer.init(stacked)
    for grads in gradients:
        grads = jax.tree.unflatten(treedef, [jnp.asarray(g, jnp.float32) for g in grads])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for got, want in zip(jax.tree.leaves(params), expected):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_norm_limit_zero_clips_nothing():
    optimizer = common.make_optimizer(1.0, steps=2, max_grad_norm=0.0, b1=0.0, b2=0.0, eps=1.0)
    params = {"kernel": jnp.zeros((1, 1))}
    updates, _ = optimizer.update({"kernel": jnp.full((1, 1), 99.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.99]], rtol=1e-6)  # without memory: -g / (|g| + eps)


def test_print_samples(capsys):
    common.print_samples("before", ["Once\nupon", "x" * 30], ["a time", ""], width=12)
    assert capsys.readouterr().out == "--- before\n  Once\\nupon >>> a time\n  xxxxxxxxx... >>> \n"


def test_table():
    rows = [
        {"stage": "start", "reward": 0.25, "seconds": 3},
        {"stage": "grpo", "reward": np.float32(11.5), "seconds": 120},
    ]
    assert common.table(rows).splitlines() == [
        "stage  reward  seconds",
        "----------------------",
        "start    0.25        3",
        "grpo     11.5      120",
    ]
    with pytest.raises(ValueError, match="row 1 has columns"):
        common.table([{"a": 1}, {"b": 1}])
    with pytest.raises(ValueError, match="no rows"):
        common.table([])
