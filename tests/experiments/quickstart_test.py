"""The quickstart with a few steps: what it prints and leaves behind; its verifier, its problems, its pairs."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import quickstart
from quickstart import Config

from alignax.io import hf
from alignax.sampling import Samples

TINY = {
    "digits": 2,
    "world_right": 0.5,
    "pretrain_steps": 60,
    "sft_steps": 5,
    "dpo_steps": 2,
    "reward_steps": 3,
    "ppo_steps": 2,
    "grpo_steps": 2,
    "batch_size": 16,
    "group": 4,
    "pair_rollouts": 2,
    "held_out": 1,
    "evaluate_every": 1,
}


def test_verifier():
    prompts = ["3172>"] * 7 + ["00>", "5>"]
    completions = ["1237.", "1237", "7321.", "12337.", "127.", "", "1237..", "00.", "5."]
    assert quickstart.is_sorted(prompts, completions, unused=[0] * 9) == [1.0, 0, 0, 0, 0, 0, 0, 1.0, 1.0]


def test_held_out_problems_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    training = quickstart.draw_problems(rng, 2, 500)
    held_out = quickstart.draw_problems(rng, 2, 500, held_out=True)
    assert all(problem[2:] == ">" and sum(map(int, problem[:2])) % 10 for problem in training)
    assert set(held_out) == {f"{a}{-a % 10}>" for a in range(10)}
    assert not set(training) & set(held_out)


def test_demonstrations_are_right_as_often_as_said():
    rng = np.random.default_rng(0)
    drawn = [quickstart.demonstrate(rng, "3172>", right=0.25) for _ in range(2000)]
    assert set(drawn) == {"1237.", "7321."}
    assert drawn.count("1237.") / 2000 == pytest.approx(0.25, abs=0.04)


def test_pairs_hold_a_right_and_a_wrong_answer_to_one_problem():
    """A made-up rollout: row r has the token r, and the rewards leave three pairs, one problem without any."""
    config = Config(batch_size=3, group=4, pair_rollouts=1)
    rewards = np.array([1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0], np.float32)
    tokens = jnp.broadcast_to(jnp.arange(12)[:, None], (12, 14))
    ones = jnp.ones((12, 14))
    rows = Samples(tokens, ones.astype(int), ones > 0, -tokens / 2, jnp.full(12, 7), ones[:, 0] > 0)
    pairs = quickstart.sample_pairs(config, None, lambda params, prompts, key: (rows, [], rewards))
    np.testing.assert_array_equal(pairs.tokens[:, :, 0], [[0, 1], [9, 8], [10, 11]])
    np.testing.assert_array_equal(pairs.ref_logp, -pairs.tokens / 2)
    assert pairs.mask.shape == pairs.segments.shape == (3, 2, 14)
    with pytest.raises(ValueError, match="no pairs: in 1 rollouts"):
        quickstart.sample_pairs(config, None, lambda params, prompts, key: (rows, [], 0 * rewards))


def test_a_short_run(tmp_path, capfd):
    config = Config(output=tmp_path / "out", **TINY)
    table = quickstart.main(config)
    assert [row["stage"] for row in table] == ["base", "SFT", "DPO", "PPO", "GRPO"]
    for row in table:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["greedy"] <= 1
        assert math.isfinite(row["kl"]) and row["seconds"] >= 0
    assert table[1]["kl"] == 0  # the samples' log-probabilities are the trainer's
    assert all(row["kl"] != 0 for row in table[2:])

    printed = capfd.readouterr().out
    assert printed.count(">>>") == 20 and "stage  accuracy" in printed
    assert (config.output / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(1, 66), 65, 66, 67, 68, 69, 70, 70, 70, 71, 72, 72, 73, 74]
    assert all(value is not None for line in lines for value in line.values())
    assert lines[66]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)  # nothing learned yet: the reference is right
    assert lines[71].keys() == {"step", "reward/accuracy"} and 0 <= lines[71]["reward/accuracy"] <= 1
    assert f"right about {lines[71]['reward/accuracy']:.3f} of held-out pairs" in printed
    assert lines[74].keys() > {"ppo/reward", "ppo/explained_variance", "ppo/accuracy", "ppo/greedy", "ppo/kl"}
    assert lines[-1].keys() > {"grpo/reward", "grpo/accuracy", "grpo/greedy", "grpo/kl"}
    loaded = hf.load(config.output / "model")
    assert loaded.eos_ids == (quickstart.EOS,) and loaded.tokenizer is None
    np.testing.assert_array_equal(loaded.params["final_norm"]["scale"].shape, (48,))

    with pytest.raises(ValueError, match="exists and is not empty; name a new one"):
        quickstart.main(config)


@pytest.mark.parametrize("wrong", [{"group": 1}, {"digits": 0}, {"evaluate_every": 0}])
def test_a_count_too_small_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}; expected at least"):
        Config(**wrong)
