"""The study of stories runs whole on a tiny random model; its parts do what their names say."""

import json

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


def test_pairs_are_best_against_worst_and_ties_are_dropped(capsys):
    found = endings([[0.5, 1.0, 0.0], [0.5, 0.5, 0.5]], [[False, False, True], [False] * 3])
    assert stories.pick_pairs(["a", "b"], found) == [
        {
            "prompt": "a",
            "chosen": " text 0 1",
            "rejected": " text 0 2",
            "chosen_truncated": False,
            "rejected_truncated": True,
        }
    ]
    assert "2 beginnings, 1 pairs, 1 dropped" in capsys.readouterr().out


def test_a_row_of_the_table():
    found = endings([[1.0, 0.0], [0.5, 1.0]], [[False, True], [False, False]])
    found["text"] = np.array([["a b c d", "a b c"], ["", "x y"]], object)
    found |= {"length": np.array([[4, 3], [1, 2]]), "logp": np.array([[-1.0, -2.0], [-3.0, -4.0]])}
    found["start_logp"] = np.array([[-2.0, -3.0], [-4.0, -6.0]])
    row = stories.measure("GRPO", "kl 1", found)
    assert (row["method"], row["setting"]) == ("GRPO", "kl 1")
    assert row["reward"] == pytest.approx(0.625)
    assert row["error"] == pytest.approx(0.125)  # of the prompts' means 0.5 and 0.75
    assert row["kl"] == pytest.approx(5 / 4) and row["start_nll"] == pytest.approx(15 / 10)
    assert row["distinct_3"] == pytest.approx(2 / 3)  # abc twice, bcd once
    assert row["length"] == 2.5 and row["finished"] == 0.75


def test_the_start_ends_texts_as_the_model_does(shared, tmp_path):
    """stories260K ends with id 1, which its tokenizer calls BOS; its tokenizer's own EOS is id 2."""
    config = stories.Config(model=str(shared / "models" / "stories260K-hf"), output=tmp_path)
    assert hf.load(config.model).tokenizer.eos_token_id == 2
    start = stories.make_start(config, tmp_path / "start")
    assert start.tokenizer.eos_token_id == 1 and start.eos_ids == (1, 2)


def test_the_rule_pays_for_happy_words_and_only_with_them_for_an_end():
    endings = ["Happy, glad and proud, they had fun.", "happy happy", "", "The end.", "happy and glad"]
    truncated = [False, True, False, False, False]
    assert stories.happy_ending([""] * 5, endings, truncated=truncated) == [1.0, 0.125, 0.0, 0.0, 0.5]


def test_the_study_runs_whole(tiny_folder, tmp_path, capsys, monkeypatch):
    # a random model of bytes writes no words: pairs need another rule (GRPO loads the script's own, and scores 0)
    monkeypatch.setattr(stories, "happy_ending", lambda prompts, endings, **_: [len(text) / 100 for text in endings])
    config = stories.Config(
        model=str(tiny_folder),
        output=tmp_path / "out",
        beginnings=100,
        held_out=4,
        opening="Once",
        beginning_tokens=24,
        max_new_tokens=24,
        group=4,
        betas=(0.1,),
        dpo_steps=10,
        kl_weights=(0.1,),
        grpo_steps=5,
        batch_size=2,
    )
    points = stories.main(config)
    assert [point["method"] for point in points] == ["start", "DPO", "GRPO"]
    assert points[0]["kl"] == pytest.approx(0, abs=1e-3) and all(np.isfinite(point["kl"]) for point in points)
    assert json.loads((config.output / "results.json").read_text()) == points
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
        jax.tree.map(np.isfinite, jax.tree.map(np.sum, hf.load(config.output / "grpo_0.1" / "model").params))
    )
    with pytest.raises(ValueError, match="exists and is not empty"):
        stories.main(config)
