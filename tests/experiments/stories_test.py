"""The study of stories runs whole on a tiny random model; its parts do what their names say."""

import dataclasses
import json

import happy_endings
import jax
import numpy as np
import pytest
import stories

from alignax.io import hf


def endings(rewards, truncated=None):
    """Arrays such as `draw` returns, for given rewards [prompts, group]."""
    rewards = np.asarray(rewards, np.float32)
    texts = [[f" text {row} {column}" for column in range(rewards.shape[1])] for row in range(len(rewards))]
    return {
        "reward": rewards,
        "truncated": np.zeros(rewards.shape, bool) if truncated is None else np.asarray(truncated),
        "text": np.array(texts, object),
    }


def test_pairs_are_what_the_rule_tells_apart(capsys):
    config = stories.Config(model="", output=None, pairs=10)
    found = endings([[0.5, 1.0, 0.0], [0.5, 0.5, 0.5]], [[False, False, True], [False] * 3])
    found["text"][0, 0] = ""  # nothing to score
    assert happy_endings.pick_pairs(config, ["a", "b"], found) == [
        {
            "prompt": "a",
            "chosen": " text 0 1",
            "rejected": " text 0 2",
            "chosen_truncated": False,
            "rejected_truncated": True,
        }
    ]
    assert "2 beginnings, 1 pairs; 1 beginnings dropped" in capsys.readouterr().out
    many = endings([[0.1, 0.2, 0.3, 0.4]])
    assert len(happy_endings.pick_pairs(config, ["a"], many)) == 6
    assert len(happy_endings.pick_pairs(dataclasses.replace(config, pairs=2), ["a"], many)) == 2


def test_accuracy_of_a_reward_model_on_pairs():
    found = endings([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    found["learned"] = np.array(
        [[0.0, 2.0, 1.0], [3.0, -1.0, 3.0], [0.0, 1.0, 2.0]]
    )  # right 2 of 3, 1 of 2 (a tie), none
    result = happy_endings.pair_accuracy(found)
    assert result["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result["error"] == pytest.approx(np.std([2 / 3, 1 / 2], ddof=1) / np.sqrt(2))
    assert (result["pairs"], result["beginnings"]) == (5, 2)


def test_a_line_of_the_results_and_their_mean_over_seeds():
    found = endings([[1.0, 0.0], [0.5, 1.0]], [[False, True], [False, False]])
    found["text"] = np.array([["a b c d", "a b c"], ["", "x y"]], object)
    found |= {"length": np.array([[4, 3], [1, 2]]), "logp": np.array([[-1.0, -2.0], [-3.0, -4.0]])}
    found["start_logp"] = np.array([[-2.0, -3.0], [-4.0, -6.0]])
    found["learned"] = np.array([[1.0, 2.0], [3.0, 4.0]])
    row = happy_endings.measure(stories.Trial("GRPO", "kl 1", 3, None), found)
    assert (row["method"], row["setting"], row["seed"]) == ("GRPO", "kl 1", 3)
    assert row["reward"] == pytest.approx(0.625) and row["learned"] == pytest.approx(2.5)
    assert row["error"] == pytest.approx(0.125)  # of the prompts' means 0.5 and 0.75
    assert row["kl"] == pytest.approx(5 / 4) and row["start_nll"] == pytest.approx(15 / 10)
    assert row["distinct_3"] == pytest.approx(2 / 3)  # abc twice, bcd once
    assert row["length"] == 2.5 and row["finished"] == 0.75
    mean, other = happy_endings.over_seeds([row, row | {"reward": 0.825}, row | {"setting": "kl 2"}])
    assert (mean["seeds"], other["seeds"]) == (2, 1)
    assert mean["reward"] == pytest.approx(0.725) and mean["spread"] == pytest.approx(0.2 / np.sqrt(2))
    assert np.isnan(other["spread"]) and other["kl"] == pytest.approx(5 / 4)


def test_the_start_ends_texts_as_the_model_does(shared, tmp_path):
    """stories260K ends with id 1, which its tokenizer calls BOS; its tokenizer's own EOS is id 2."""
    config = stories.Config(model=str(shared / "models" / "stories260K-hf"), output=tmp_path)
    assert hf.load(config.model).tokenizer.eos_token_id == 2
    start = happy_endings.make_start(config, tmp_path / "start")
    assert start.tokenizer.eos_token_id == 1 and start.eos_ids == (1, 2)


def test_the_rule_pays_for_happy_words_and_only_with_them_for_an_end():
    endings = ["Happy, glad and proud, they had fun.", "happy happy", "", "The end.", "happy and glad"]
    truncated = [False, True, False, False, False]
    assert happy_endings.happy_ending([""] * 5, endings, truncated=truncated) == [1.0, 0.125, 0.0, 0.0, 0.5]


def test_small_rollouts_learn_from_as_many_endings_and_a_reference_as_far():
    large = {"prompts": 48, "steps": 20, "ema_rate": 0.05}
    small = stories.WITHOUT["large rollouts"](large)
    assert (small["prompts"], small["steps"]) == (12, 80)
    assert (1 - small["ema_rate"]) ** 80 == pytest.approx((1 - 0.05) ** 20)


def test_each_practice_is_left_out_by_its_own_setting(monkeypatch, tmp_path):
    """The runs of the plan as PPO's script gets them: no two differ in more than the practice that they name."""
    given = []
    monkeypatch.setattr(stories.ppo, "main", lambda config: given.append(dataclasses.asdict(config)))
    config = stories.Config(model="", output=tmp_path, betas=(), kl_weights=(), kl_coefs=(0.1,), seeds=(3,))
    for trial in stories.plan(config):
        stories.run(config, trial)
    whole, *without = given
    changed = [{name for name in whole if whole[name] != less[name]} - {"output"} for less in without]
    assert changed == [
        {"whiten_advantages"},
        {"prompts", "steps", "evaluate_every", "ema_rate"},
        {"ema_rate"},
    ]
    assert whole["whiten_advantages"] and not without[0]["whiten_advantages"] and without[2]["ema_rate"] == 0


def test_the_study_runs_but_for_its_ablations(tiny_folder, tmp_path, capsys, monkeypatch):
    # a random model of bytes writes no words: pairs need another rule (GRPO loads the script's own, and scores 0)
    by_length = lambda prompts, endings, **_: [len(text) / 100 for text in endings]  # noqa: E731
    monkeypatch.setattr(happy_endings, "happy_ending", by_length)
    config = stories.Config(
        model=str(tiny_folder),
        output=tmp_path / "out",
        beginnings=100,
        held_out=4,
        opening="Once",
        beginning_tokens=24,
        max_new_tokens=24,
        group=4,
        reward_steps=10,
        betas=(0.1,),
        dpo_steps=10,
        kl_weights=(0.1,),
        grpo_steps=5,
        kl_coefs=(0.1,),
        ppo_steps=5,
        ablations=False,  # each is compiled anew; the test above holds their settings
        batch_size=2,
        seeds=(3,),
    )
    points = stories.main(config)
    methods = [(point["method"], point["setting"]) for point in points]
    assert methods == [("start", ""), ("DPO", "beta 0.1"), ("GRPO", "kl 0.1"), ("PPO", "kl 0.1")]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-3) and all(np.isfinite(point["kl"]) for point in points)
    results = json.loads((config.output / "results.json").read_text())
    assert results["runs"] == points and 0 <= results["reward_model"]["accuracy"] <= 1
    held_out, seen = (
        {json.loads(line)["prompt"] for line in (config.output / name).read_text().splitlines()}
        for name in ("held_out.jsonl", "beginnings.jsonl")
    )
    assert len(held_out) == 4 and seen and not held_out & seen and all(x.startswith("Once") for x in held_out)
    pairs = [json.loads(line) for line in (config.output / "pairs.jsonl").read_text().splitlines()]
    assert {pair["prompt"] for pair in pairs} <= seen
    assert (config.output / "stories.png").stat().st_size > 1000
    assert "-- DPO beta 0.1: " in (config.output / "samples.txt").read_text()
    assert "minutes" in capsys.readouterr().out
    assert jax.tree.all(
        jax.tree.map(
            np.isfinite, jax.tree.map(np.sum, hf.load(config.output / "seed_3" / "ppo_kl_0.1" / "model").params)
        )
    )
    with pytest.raises(ValueError, match="exists and is not empty"):
        stories.main(config)
