"""What `grpo.py` can be told: every combination is one of functions that fit, and what means nothing is refused."""

import itertools
import json
import types

import grpo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems, tiny

from alignax import advantages


def config(**options):
    return grpo.Config(**{"model": "", "data": "", "output": "", "reward": "last_number", **options})


def test_every_name_is_a_function():
    for table in (grpo.ADVANTAGES, grpo.POLICY_LOSSES, grpo.CORRECTIONS, grpo.KLS):
        assert all(callable(function) for name, function in table.items() if name != "none")
    assert grpo.KLS["none"] is None and grpo.CORRECTIONS["none"] is None
    assert not {"k1", "absolute"} & grpo.KLS.keys()  # as losses, k1 has no gradient in expectation, absolute no KL


def combinations():
    """Each name at least once, not the product."""
    rest = (grpo.CORRECTIONS, grpo.KLS, ("sequence", "sequence_sum", "token", "constant"))
    columns = [itertools.islice(itertools.cycle(names), len(grpo.POLICY_LOSSES)) for names in rest]
    return list(zip(grpo.POLICY_LOSSES, *columns))


@pytest.mark.parametrize("policy_loss, correction, kl, mean", combinations())
def test_any_policy_loss_goes_with_any_correction_and_mean(policy_loss, correction, kl, mean):
    options = config(policy_loss=policy_loss, correction=correction, kl=kl, mean=mean, entropy_weight=0.1)
    model, params = tiny()
    loss_fn = grpo.make_loss(options, model)
    batch = problems()["grpo"].batch
    batch = jax.tree.map(jnp.asarray, batch._replace(rollout_logp=batch.old_logp, ref_logp=batch.old_logp))
    terms, metrics = jax.eval_shape(loss_fn, params, batch, None, grpo.hyperparameters(options))  # nothing is computed
    assert terms.keys() == {"policy", "entropy"} | ({"kl"} if kl != "none" else set())
    assert {"clip_fraction", "sampling/kl"} <= metrics.keys()


@pytest.mark.parametrize("name", grpo.ADVANTAGES)
def test_any_advantage_of_rows_that_fill_up_and_groups_without_spread(name):
    """Three prompts, two completions each; the last prompt is a filler, the first has no spread."""
    mask = np.arange(4) < np.array([[2], [3], [4], [1], [4], [2]])
    rows = types.SimpleNamespace(mask=jnp.asarray(mask), lengths=jnp.asarray(mask.sum(1)))
    reward, real = np.float32([1, 1, 3, 0, 100, -100]), np.array([True] * 4 + [False] * 2)
    options = config(advantages=name, group=2, filter_groups=True, max_new_tokens=4)
    found, weights, metrics = grpo.compare(options, reward, rows, real)
    np.testing.assert_array_equal(weights, [0, 0, 1, 1, 0, 0])
    assert metrics.keys() == {"frac_reward_zero_std"} and metrics["frac_reward_zero_std"] == 0.5
    grouped = jnp.asarray(reward[:4]).reshape(2, 2)
    if name == "opo":
        expected = advantages.opo(grouped, jnp.asarray([[2, 3], [4, 1]])).ravel()
    elif name == "reinforce_plus_plus_baseline":
        expected = advantages.reinforce_plus_plus_baseline(grouped, jnp.asarray(mask[:4]).reshape(2, 2, 4))
        expected = expected.reshape(4, 4)
    else:
        expected = getattr(advantages, name)(grouped).ravel()
    np.testing.assert_allclose(found[:4], expected, rtol=1e-6, atol=1e-6)
    assert not np.any(found[4:])


def test_overlong_completions_are_punished_but_do_not_count_as_spread():
    rows = types.SimpleNamespace(mask=jnp.ones((4, 8)), lengths=jnp.array([2, 8, 7, 6]))
    options = config(advantages="group_centred", group=2, overlong_cache=4, max_new_tokens=8, filter_groups=True)
    found, weights, metrics = grpo.compare(options, np.float32([1, 1, 1, 0]), rows, np.ones(4, bool))
    np.testing.assert_allclose(found, [0.5, -0.5, 0.375, -0.375])  # of rewards 1, 0, 0.25 and -0.5
    np.testing.assert_array_equal(weights, [0, 0, 1, 1])
    np.testing.assert_allclose(metrics["overlong_penalty"], -(0 + 1 + 0.75 + 0.5) / 4)


def test_hyperparameters_reach_what_they_are_for():
    options = config(
        policy_loss="cispo", hyper={"ratio_max": 4.0, "correction_cap": 3.0}, correction="truncated_is_token"
    )
    assert grpo.hyperparameters(options) == {
        "kl_weight": 0.04, "temperature": 1.0, "ratio_max": 4.0, "correction_cap": 3.0
    }  # fmt: skip
    options = config(clip_low=0.1, hyper={"dual_clip": 3.0}, entropy_weight=0.5, off_policy_threshold=0.2)
    expected = {"clip_low": 0.1, "dual_clip": 3.0, "entropy_weight": 0.5, "off_policy_threshold": 0.2}
    assert grpo.hyperparameters(options) == {"kl_weight": 0.04, "temperature": 1.0} | expected
    # what is told reaches the loss: two caps, two losses
    batch = problems()["grpo"].batch
    batch = jax.tree.map(jnp.asarray, batch._replace(old_logp=batch.old_logp - 3.0, ref_logp=batch.old_logp))
    model, params = tiny()
    loss_fn = jax.jit(grpo.make_loss(config(policy_loss="cispo", kl="none"), model))
    found = [loss_fn(params, batch, None, {"ratio_max": cap})[0]["policy"].mean.value() for cap in (1.0, 2.0)]
    np.testing.assert_allclose(found[1] / found[0], 2.0, rtol=0.2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hyper": {"ratio_max": 4.0}}, r"hyper \['ratio_max'\]: unknown to --policy-loss ppo_clip.*\['clip_high', "),
        ({"policy_loss": "cispo", "clip_low": 0.2}, r"hyper \['clip_low'\]: unknown to --policy-loss cispo.*_max"),
        (
            {"hyper": {"correction_cap": 2.0}},
            r"hyper \['correction_cap'\]: unknown to --correction none; expected none",
        ),
        ({"policy_loss": "ppo_penalty", "hyper": {"kl_weight": 2.0}}, "hyper kl_weight: the reference's here"),
        ({"clip_low": 0.1, "hyper": {"clip_low": 0.2}}, r"hyper \['clip_low'\]: also given by flags of their own"),
        ({"hyper": {"dual_clip": float("inf")}}, "hyper dual_clip=inf; expected a finite number"),
        ({"hyper": {"dual_clip": 0.5}}, r"dual_clip=0\.5; expected a number above 1"),
        (
            {"correction": "icepop", "hyper": {"correction_low": 7.0}},
            r"low=7\.0, high=5\.0; expected low < high",
        ),
    ],
)
def test_hyperparameters_that_fit_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grpo.hyperparameters(config(**options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overlong_cache": 200}, "overlong_cache=200; expected 128 or less"),
        ({"overlong_cache": -1}, "overlong_cache=-1; expected 0 or more"),
        ({"temperature": 0.0}, "temperature=0.0; expected a number above 0"),
        ({"entropy_weight": -0.1}, r"entropy_weight=-0\.1; expected 0 or more"),
        ({"clip_high": -0.1}, r"clip_high=-0\.1; expected 0 or more"),
        ({"clip_low": 1.1}, r"clip_low=1\.1; expected 1 or less"),
        ({"hyper": {"cap": 1.0}}, r"hyper \['cap'\]: unknown"),
        (
            {"policy_loss": "reinforce", "epochs": 2},
            "reinforce with epochs=2, minibatches=1: it knows no",
        ),
        ({"unbiased_kl": True, "kl": "k2"}, "unbiased_kl with --kl k2; expected k3"),
    ],
)
def test_main_refuses_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        grpo.main(config(model=str(tmp_path / "none"), output=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_dapo_with_a_correction(tiny_folder, tmp_path):
    """Advantages of tokens, one update a rollout, the sampler's own log-probabilities."""
    (tmp_path / "mine.py").write_text(
        "def vowels(prompts, completions, **_):\n    return [any(c in 'aeiou' for c in text) for text in completions]\n"
    )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    options = config(
        model=str(tiny_folder),
        data=str(tmp_path / "data.jsonl"),
        output=tmp_path / "out",
        reward=f"{tmp_path / 'mine.py'}:vowels",
        steps=2,
        prompts=4,
        group=4,
        max_new_tokens=8,
        evaluate_every=2,
        warmup=0,
        learning_rate=1e-2,
        advantages="reinforce_plus_plus_baseline",
        policy_loss="gspo",
        mean="token",
        clip_high=0.28,
        kl="none",
        correction="truncated_is_token",
        hyper={"correction_cap": 1.5},
        filter_groups=True,
        overlong_cache=4,
        entropy_weight=0.01,
    )
    grpo.main(options)
    _, *lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    names = {"overlong_penalty", "frac_reward_zero_std", "sampling/kl", "loss/entropy", "ratio"}
    assert all(names <= line.keys() and np.isfinite(list(line.values())).all() for line in lines)
    assert all(abs(line["ratio"] - 1) < 1e-6 and abs(line["sampling/kl"]) < 1e-3 for line in lines)
    assert all(-1 <= line["overlong_penalty"] < 0 and "kl" not in line for line in lines)
