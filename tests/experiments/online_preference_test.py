"""The script runs whole on a tiny model, learns from the sides it should, and refuses what it should."""

import json

import duels
import jax
import jax.numpy as jnp
import numpy as np
import online_preference
import pytest
import rollouts

from alignax import data, sampling
from alignax.algorithms import nash_md, preference
from alignax.io import hf

SMALL = {"prompts": 4, "max_new_tokens": 5, "evaluate_every": 2, "warmup": 1, "learning_rate": 1e-2}


def write(folder):
    """A file of prompts, and one with a preference and a reward."""
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(11)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(
        "def vowels(prompts, completions, *, answer, truncated, **_):\n"
        "    assert len(answer) == len(truncated) == len(prompts)\n"
        "    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
        "def prefer(prompts, first, second, *, answer, first_truncated, second_truncated):\n"
        "    assert prompts == [f'say {a}' for a in answer] and len(first_truncated) == len(second_truncated)\n"
        "    return [0.5 + 0.4 * ((a > b) - (a < b)) for a, b in zip(first, second)]\n"
    )
    return {"data": str(folder / "data.jsonl"), "output": folder / "out"}, f"{folder / 'mine.py'}"


@pytest.mark.parametrize("method", ["nash_md", "sppo"])
def test_whole(tiny_folder, tmp_path, capsys, method):
    files, mine = write(tmp_path)
    options = {
        # the last of three rollouts an epoch has filler rows
        "nash_md": {"steps": 3, "prefer": f"{mine}:prefer", "mixture": 0.5, "microbatches": 2}
        | {"save_rollouts": True, "temperature": 0.7, "min_p": 1e-3},
        "sppo": {"steps": 2, "reward": f"{mine}:vowels", "samples": 3, "reference_every": 1},
    }[method]
    config = online_preference.Config(model=str(tiny_folder), method=method, **files, **SMALL, **options)
    online_preference.main(config)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(config.steps + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert {"held_out/win_rate", "held_out/kl", "held_out/length"} <= set(lines[0]) & set(lines[-1])
    assert abs(lines[0]["held_out/kl"]) < 1e-5 < abs(lines[-1]["held_out/kl"])
    if method == "sppo":  # the reference is the policy as each iteration begins: log-ratios start from 0 again
        assert all(abs(line["rewards/chosen"]) < 1e-7 for line in lines[1:]) and "ties" in lines[1]
    else:  # the reference is the start
        assert abs(lines[1]["kl"]) < 1e-5 < lines[3]["kl"] and "rewards/probabilities" in lines[1]
        assert lines[1]["parity/max"] < 1e-5 and "parity/max" not in lines[2]
        found = data.rollouts.read(config.output / "rollouts")
        assert found.columns["player"] == ["policy", "mixture"] * 12 and found.columns["step"][::8] == [1, 2, 3]
        np.testing.assert_array_equal(
            found.row_ids, [0, 0, 1, 1, 2, 2, 3, 3] * 3
        )  # each player samples one of a prompt
        assert found.prompts[::2] == found.prompts[1::2] and sum(found.columns["weight"]) == 20
        np.testing.assert_allclose(found.rewards.reshape(12, 2).sum(axis=1), 1, atol=1e-6)  # win rates of two
    saved, start = hf.load(config.output / "model"), hf.load(tiny_folder)
    assert not np.array_equal(saved.params["embed"]["embedding"], start.params["embed"]["embedding"])
    assert "win rate against the start" in capsys.readouterr().out


PREFERENCES = np.full((4, 2, 2), 0.5, np.float32)
PREFERENCES[:, 0, 1], PREFERENCES[:, 1, 0] = [0.9, 0.2, 0.5, 1.0], [0.1, 0.8, 0.5, 0.0]
COUNTED = np.array([True, True, True, False])


def batch_of(method, preferences=PREFERENCES, players=None, **options):
    """What a method learns from; the tokens of sample i are all i."""
    config = online_preference.Config(model="", data="", output="", method=method, **options)
    count = preferences.shape[1]
    tokens = jnp.broadcast_to(jnp.arange(count)[:, None], (4, count, 3))
    ones = jnp.ones((4, count, 3), jnp.int32)
    samples = sampling.Samples(tokens, ones, ones > 0, ones * 0.0, ones[..., 0] * 3, ones[..., 0] < 0)
    players = players or online_preference.METHODS[method].players
    return online_preference.make_batch(config, players, samples, preferences, COUNTED)


def test_hard_labels_put_the_winner_first_and_drop_ties():
    for method in ("dpo", "ipo"):
        batch, metrics = batch_of(method)
        assert isinstance(batch, preference.Batch) and batch.extra == {}
        np.testing.assert_array_equal(batch.tokens[:, :, 0], [[0, 1], [1, 0], [0, 1], [0, 1]])
        np.testing.assert_array_equal(batch.weights, [1, 1, 0, 0])  # a tie, and a filler
        assert metrics["ties"] == pytest.approx(1 / 3) and metrics["preference"] == pytest.approx(1.6 / 3)
    np.testing.assert_array_equal(batch_of("dpo", keep_ties=True)[0].weights, [1, 1, 1, 0])


def test_soft_labels_know_no_order():
    for method in ("dpo_soft", "ipo_soft", "ipo_md"):
        batch, metrics = batch_of(method)
        np.testing.assert_array_equal(batch.tokens[:, :, 0], [[0, 1]] * 4)
        np.testing.assert_allclose(batch.extra["preference"], PREFERENCES[:, [0, 1], [1, 0]], rtol=1e-6)
        np.testing.assert_array_equal(batch.weights, [1, 1, 1, 0])
        assert set(batch.extra) == {"preference"} and metrics["ties"] == 0


def test_xpo_knows_whose_sample_is_whose():
    batch, _ = batch_of("xpo")
    np.testing.assert_array_equal(batch.extra["from_reference"], batch.tokens[:, :, 0])  # sample 1 is the reference's


def test_a_policy_gradient_learns_from_the_first_player_alone():
    for method in ("nash_md", "nash_ema"):
        batch, _ = batch_of(method)
        assert isinstance(batch, nash_md.Batch)
        np.testing.assert_array_equal(batch.tokens, np.zeros((4, 3)))
        np.testing.assert_allclose(batch.preference, PREFERENCES[:, 0, 1])
        np.testing.assert_array_equal(batch.weights, [1, 1, 1, 0])


def test_sppo_takes_the_best_and_the_worst_with_their_win_rates():
    scores = np.array([[0.0, 2.0, -1.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    matrix = (1 / (1 + np.exp(scores[:, None] - scores[:, :, None]))).astype(np.float32)
    batch, _ = batch_of("sppo", matrix, ("policy",) * 3)
    np.testing.assert_array_equal(batch.tokens[:2, :, 0], [[1, 2], [2, 1]])
    rates = matrix.mean(axis=2)
    expected = [[rates[0, 1], rates[0, 2]], [rates[1, 2], rates[1, 1]]]
    np.testing.assert_allclose(batch.extra["win_rate"][:2], expected, rtol=1e-6)
    np.testing.assert_array_equal(batch.weights, [1, 1, 0, 0])  # nothing to choose between equals


@pytest.mark.parametrize("route", ["prefer", "reward"])
def test_the_judge_knows_prompts_columns_and_who_was_cut_off(tiny_folder, tmp_path, route):
    _, mine = write(tmp_path)
    source = {"prefer": {"prefer": f"{mine}:prefer"}, "reward": {"reward": f"{mine}:vowels"}}[route]
    config = online_preference.Config(model="", data="", output="", missing_eos_penalty=0.5, reward_scale=2, **source)
    loaded = hf.load(tiny_folder)
    texts, size = ["a", "bb", "aaa", "aaa"], 3
    ids = [loaded.tokenizer(text)["input_ids"] for text in texts]
    tokens = jnp.asarray([x + [0] * (size - len(x)) for x in ids]).reshape(2, 2, size)
    mask = jnp.asarray([[i < len(x) for i in range(size)] for x in ids]).reshape(2, 2, size)
    cut = jnp.array([[True, False], [True, True]])
    samples = sampling.Samples(tokens, mask.astype(int), mask, mask * 0.0, mask.sum(-1), cut)
    asked = {"prompts": ["say 1", "say 2"], "columns": [{"answer": "1"}, {"answer": "2"}]}
    verdict = duels.make_judge(config, loaded)(asked, samples)
    assert verdict.completions == [["a", "bb"], ["aaa", "aaa"]]
    logit = {"prefer": np.log(0.1 / 0.9), "reward": 2.0}[route] - 0.5  # "a" < "bb", and was cut off
    p = 1 / (1 + np.exp(-logit))
    np.testing.assert_allclose(verdict.preferences, [[[0.5, p], [1 - p, 0.5]], [[0.5, 0.5], [0.5, 0.5]]], rtol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "prefer='', reward=''; expected one of them"),
        ({"prefer": "a.py:b", "reward": "last_number"}, "prefer='a.py:b', reward='last_number'; expected one of them"),
        ({"reward": "last_number", "method": "sppo"}, r"--method sppo: .*give --reference-every"),
        ({"reward": "last_number", "beta": 0.0}, "beta=0.0; expected a number above 0"),
        ({"reward": "last_number", "mixture": 1.5}, "mixture=1.5; expected 1 or less"),
        ({"reward": "last_number", "temperature": 0.0}, "temperature=0.0; expected 0.01 or more"),
        ({"reward": "last_number", "samples": 1}, "samples=1; expected 2 or more"),
        ({"reward": "last_number", "microbatches": 3}, "16 rows do not divide into 3 parts"),
    ],
)
def test_refusals(tmp_path, change, message):
    config = online_preference.Config(model="nowhere", data="nothing", output=tmp_path / "out", **change)
    with pytest.raises(ValueError, match=message):
        online_preference.main(config)
    assert not (tmp_path / "out").exists()


def test_a_process_asks_about_its_own_prompts_alone():
    """As told by `own`; about nothing it asks nothing, whatever columns the preference wants."""

    def prefer(prompts, first, second, *, answer, first_truncated, second_truncated):
        assert prompts and answer == [int(prompt) for prompt in prompts]
        return [0.9 if cut and not other else 0.5 for cut, other in zip(first_truncated, second_truncated)]

    asked = {"prompts": ["0", "1", "2"], "columns": [{}, {}, {"answer": 2}]}
    found = duels.ask(prefer, asked, np.array([2]), [["a", "b"]], np.array([[False, True]]))
    np.testing.assert_allclose(found, [[[0.5, 0.3], [0.7, 0.5]]], rtol=1e-6)
    nothing = duels.ask(prefer, asked, np.array([], int), [], np.zeros((0, 2), bool))
    assert nothing.shape == (0, 2, 2)


def test_a_preference_that_is_not_there(tmp_path):
    _, mine = write(tmp_path)
    with pytest.raises(ValueError, match=r"--prefer nothing: expected FILE\.py:FUNCTION with a file there is"):
        rollouts.find_function("prefer", "nothing")
    with pytest.raises(ValueError, match=r"--prefer .*mine.py:other: .*mine.py has no function 'other'"):
        rollouts.find_function("prefer", f"{mine}:other")


@pytest.mark.parametrize("method", online_preference.METHODS)
def test_every_method_has_samplers_and_a_loss(tiny_folder, method):
    """Traced, not compiled: the numbers that a loss takes are those that it gets."""
    config = online_preference.Config(model="", data="", output="", method=method, **SMALL)
    loaded, players = hf.load(tiny_folder), online_preference.METHODS[method].players
    players = players * 3 if method == "sppo" else players
    draw = online_preference.make_draw(config, loaded, players)
    policies = dict.fromkeys(("policy", "reference", "average"), loaded.params)
    policies["mixture"] = {"policy": loaded.params, "reference": loaded.params, "weight": jnp.asarray(0.1)}
    asked = jnp.ones((4, 2), jnp.int32), jnp.array([1, 2, 2, 1])
    samples = jax.eval_shape(draw, policies, asked, jax.random.key(0))
    assert samples.tokens.shape == (4, len(players), 2 + config.max_new_tokens)
    matrix = np.full((4, len(players), len(players)), 0.5, np.float32)
    batch, _ = batch_of(method, matrix, players)
    loss_fn = online_preference.make_loss(config, loaded.model)
    hyper, frozen = online_preference.hyperparameters(config), {"reference": loaded.params}
    terms, _ = jax.eval_shape(loss_fn, loaded.params, batch, frozen, hyper)
    assert len(terms) == 1
