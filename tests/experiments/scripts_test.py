"""Every script runs whole on a tiny model, leaves what it promises, and refuses what it should."""

import dataclasses
import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys

import actor_critic
import common
import experience
import grpo
import jax.numpy as jnp
import numpy as np
import ppo
import preference
import pytest
import reward_model
import rollouts
import sft

from alignax import data, moments, sampling, sharding, train
from alignax.io import hf


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count):
    return [{"text": f"line {i} of a text " + "ab" * (i % 5)} for i in range(count)]


def pairs(count):
    return [{"prompt": f"q{i}: ", "chosen": "yes " * (2 + i % 2), "rejected": f"no {i}"} for i in range(count)]


def prompts(count):
    return [{"prompt": f"say {i}", "answer": str(i)} for i in range(count)]


def check_output(folder, steps, names):
    """Metrics of every step, finite; a picture; a model that loads."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert names <= set().union(*lines)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert (folder / "curves.png").stat().st_size > 1000 and list(folder.glob("events.*"))
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == steps
    return hf.load(folder / "model")


def differs(left, right):
    return not np.array_equal(left["embed"]["embedding"], right["embed"]["embedding"])


def test_sft(tiny_folder, tmp_path, capsys):
    config = sft.Config(
        model=str(tiny_folder),
        data=write(tmp_path / "data.jsonl", [*texts(30), {"text": "x" * 100}]),
        output=tmp_path / "out",
        steps=4,
        batch_size=4,
        microbatches=2,
        limit=30,  # of rows of 17 to 27: one width to compile
        evaluate_every=2,
        learning_rate=1e-2,
        warmup=1,
    )
    result = sft.main(config)
    saved = check_output(config.output, 4, {"loss", "held_out/loss", "held_out/accuracy", "grad_norm", "skipped"})
    assert differs(saved.params, hf.load(tiny_folder).params) and saved.tokenizer is not None
    first = json.loads((config.output / "metrics.jsonl").read_text().splitlines()[0])
    assert result["held_out/loss"] < first["held_out/loss"]
    printed = capsys.readouterr().out
    assert "31 rows read, 30 kept, 1 dropped" in printed and "--- before" in printed and "--- after" in printed
    with pytest.raises(ValueError, match="exists and is not empty"):
        sft.main(config)


OBJECTIVES = {
    "dpo": {"reference": "soft", "reference_every": 2, "microbatches": 2},
    "mdpo": {"reference": "sdpo", "bfloat16": True},  # the chosen side after another prompt; a stage each two updates
    # evaluated where the reference becomes the policy
    "beta_dpo": {"nll_weight": 0.1, "reference": "hard", "reference_every": 2},
}


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_preference(tiny_folder, tmp_path, capsys, monkeypatch, loss):
    if loss != "dpo":  # whose test shows what is sampled
        monkeypatch.setattr(common, "make_show", lambda *args, **options: lambda *shown: None)
    config = preference.Config(
        model=str(tiny_folder),
        data=write(tmp_path / "data.jsonl", [row | {"degraded_prompt": "Well: "} for row in pairs(20)]),
        output=tmp_path / "out",
        loss=loss,
        **OBJECTIVES[loss],
        steps=4,
        batch_size=4,
        limit=20,
        evaluate_every=2,
        learning_rate=1e-2,
        warmup=1,
    )
    result = preference.main(config)
    check_output(config.output, 4, {"rewards/margins", "held_out/loss", "held_out/rewards/accuracies"})
    assert result["held_out/rewards/accuracies"] == 1.0  # "yes" against "no" is soon learned
    assert "held-out accuracy 1.000 +- 0.000 over 2 pairs" in capsys.readouterr().out


def test_grpo_with_a_reward_of_the_users_own(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def vowels(prompts, completions, *, answer, truncated, **_):\n"
        "    assert len(answer) == len(truncated) == len(prompts)\n"
        "    return [sum(c in 'aeiou' for c in text) / 8 for text in completions]\n"
    )
    config = grpo.Config(
        model=str(tiny_folder),
        data=write(tmp_path / "data.jsonl", prompts(12)),
        output=tmp_path / "out",
        reward=f"{tmp_path / 'mine.py'}:vowels",
        steps=3,
        prompts=4,
        group=4,
        epochs=2,
        minibatches=2,
        microbatches=2,
        max_new_tokens=8,
        evaluate_every=2,
        learning_rate=1e-2,
        ema_rate=0.1,
    )
    grpo.main(config)
    check_output(config.output, 3, {"reward", "kl", "ratio", "clip_fraction", "held_out/reward", "held_out/kl"})


def test_grpo_on_a_mesh(tiny_folder, tmp_path):
    """Four simulated devices, two of them for each layer; they need a process of their own."""
    (tmp_path / "mine.py").write_text(
        "def size(prompts, completions, **_):\n    return [len(c) for c in completions]\n"
    )
    command = [sys.executable, grpo.__file__, "--model", tiny_folder, "--output", tmp_path / "out", "--tensor", "2"]
    command += ["--data", write(tmp_path / "data.jsonl", prompts(12)), "--reward", f"{tmp_path / 'mine.py'}:size"]
    command += "--steps 1 --warmup 0 --prompts 4 --group 4 --minibatches 2 --max-new-tokens 4".split()
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    check_output(tmp_path / "out", 1, {"reward", "held_out/kl"})


def test_grpo_refuses(tiny_folder, tmp_path):
    data = write(tmp_path / "data.jsonl", prompts(8))
    config = {"model": str(tiny_folder), "data": data, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match="--group 1: a group baseline needs at least 2"):
        grpo.main(grpo.Config(**config, reward="last_number", group=1))
    with pytest.raises(ValueError, match="64 rows do not divide into 3 parts on 1 devices"):
        grpo.main(grpo.Config(**config, reward="last_number", minibatches=3))
    with pytest.raises(ValueError, match=r"--reward nonsense: expected one of \['last_number'\]"):
        grpo.main(grpo.Config(**config, reward="nonsense"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "nan.py").write_text("def nan(prompts, completions, **_):\n    return [float('nan')] * len(prompts)\n")
    with pytest.raises(ValueError, match="reward nan returned nan for row 0, prompt 'say"):
        grpo.main(grpo.Config(**config, reward=f"{tmp_path / 'nan.py'}:nan", max_new_tokens=4, steps=1, warmup=0))
    assert not (tmp_path / "out" / "model").exists()


@pytest.fixture(scope="module")
def reward_folder(tiny_folder, tmp_path_factory):
    """What reward_model.py makes of the tiny model."""
    folder = tmp_path_factory.mktemp("reward")
    config = reward_model.Config(
        model=str(tiny_folder),
        data=write(folder / "data.jsonl", [row | {"margin": 0.5, "preference": 0.9} for row in pairs(20)]),
        output=folder / "out",
        steps=4,
        batch_size=4,
        limit=20,
        evaluate_every=2,
        learning_rate=1e-2,
        warmup=1,
    )
    reward_model.main(config)
    return config.output


def test_reward_model(reward_folder, tiny_folder, tmp_path):
    names = {"rewards/margins", "held_out/loss", "held_out/rewards/accuracies"}
    saved = check_output(reward_folder, 4, names)
    assert saved.model.values is not None and saved.params["score"]["kernel"].shape == (16, 1)
    assert differs(saved.params["backbone"], hf.load(tiny_folder).params) and saved.tokenizer is not None
    first, *_, last = (json.loads(line) for line in (reward_folder / "metrics.jsonl").read_text().splitlines())
    assert last["held_out/loss"] < first["held_out/loss"]
    # two held-out pairs of nearly one margin z: the loss by its formula, with a label wrong in ten and a margin of 0.5
    z = last["held_out/rewards/margins"] - 0.5
    expected = 0.9 * np.log1p(np.exp(-z)) + 0.1 * np.log1p(np.exp(z))
    assert last["held_out/loss"] == pytest.approx(expected, rel=0.05)

    config = reward_model.Config(
        model=str(reward_folder / "model"), data=write(tmp_path / "data.jsonl", pairs(20)), output=tmp_path, limit=40
    )
    again = reward_model.load_scored(config, sharding.make_mesh())
    np.testing.assert_array_equal(again.params["score"]["kernel"], saved.params["score"]["kernel"])
    rows, _ = reward_model.load_pairs(dataclasses.replace(config, label_smoothing=0.25), again.tokenizer)
    assert {(row.margin, row.preference) for row in rows} == {(0.0, 0.75)}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"margin": "much"}, "wrong margin: 'much'; expected a number"),
        ({"margin": True}, "wrong margin: True; expected a number"),
        ({"preference": 1.5}, r"wrong preference: 1\.5; expected a probability"),
    ],
)
def test_reward_model_refuses_columns(tiny_folder, tmp_path, change, message):
    data = write(tmp_path / "data.jsonl", [*pairs(3), pairs(1)[0] | change])
    with pytest.raises(ValueError, match=message):
        reward_model.main(reward_model.Config(model=str(tiny_folder), data=data, output=tmp_path / "out", limit=40))
    assert not (tmp_path / "out").exists()


PPO = {"prompts": 4, "group": 2, "minibatches": 2, "max_new_tokens": 6, "evaluate_every": 2, "warmup": 1}


def run_ppo(tiny_folder, reward_folder, tmp_path, **options):
    config = ppo.Config(
        model=str(tiny_folder),
        data=write(tmp_path / "data.jsonl", prompts(12)),  # three rollouts an epoch, the last one with filler rows
        output=tmp_path / "out",
        reward_model=str(reward_folder / "model"),
        **PPO | options,
    )
    result = ppo.main(config)
    names = {"objective/kl", "kl_coef", "ratio", "clip_fraction", "loss/value", "values", "values/clip_fraction"}
    names |= {"values/explained_variance", "held_out/reward", "held_out/kl", "updates", "returns/std"}
    saved = check_output(config.output, config.steps, names)
    assert saved.model.values is None and differs(saved.params, hf.load(tiny_folder).params)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    return config, result, lines[1:]


def test_ppo_with_a_learned_reward_and_critic(tiny_folder, reward_folder, tmp_path, monkeypatch):
    traced, make_update = [], train.make_update

    def recorded(*args, **options):
        update = make_update(*args, **options)

        def traced_update(*args):
            traced.append(update)
            return update(*args)

        return traced_update

    monkeypatch.setattr(train, "make_update", recorded)
    config, _, lines = run_ppo(
        tiny_folder,
        reward_folder,
        tmp_path,
        steps=3,
        epochs=2,
        ema_rate=0.5,
        kl_target=0.01,
        kl_horizon=10,
        reward_scaling="start",
        reward_clip=1.0,
        critic_warmup=1,
        learning_rate=1e-2,
        policy_loss="ppo_hybrid",
        hyper={"clip_high": 0.3},
        penalty_weight=0.5,
        penalty_target=1e-6,
        entropy_weight=0.1,
        entropy_target=100.0,
        entropy_step=0.01,
    )
    critic, reward = hf.load(config.output / "critic"), hf.load(reward_folder / "model")
    assert differs(critic.params["backbone"], reward.params["backbone"])
    assert "ratio" not in lines[0] and [line["updates"] for line in lines] == [4] * 3  # the critic alone at first
    # so that the policy of the second rollout is still the reference
    assert [abs(line["objective/kl"]) < 1e-5 for line in lines] == [True, True, False]
    # nor does the weight of the KL move as long as nothing can change the KL
    np.testing.assert_allclose([line["kl_coef"] for line in lines], [0.05, 0.05, 0.05 * (1 - 0.2 * 8 / 10)], 1e-5)
    assert abs(lines[0]["objective/scores"]) <= 1 and "reward/rule" not in lines[0]
    # neither do the other weights; the policy moves by more than the penalty's target, its entropy is below the other
    np.testing.assert_allclose([line["penalty_weight"] for line in lines], [0.5, 0.5, 1.0])
    np.testing.assert_allclose([line["entropy_weight"] for line in lines], [0.1, 0.1, 0.11], rtol=1e-6)
    assert "approx_kl/after" not in lines[0] and min(line["approx_kl/after"] for line in lines[1:]) > 1.5e-6
    assert len(traced) == len(set(traced)) == 2  # a weight that moves compiles nothing


def test_ppo_with_both_rewards_and_a_shared_critic(tiny_folder, reward_folder, tmp_path):
    config, result, lines = run_ppo(
        tiny_folder,
        reward_folder,
        tmp_path,
        reward=write_rules(tmp_path, "vowels"),
        reward_weight=2.0,
        reward_model_weight=0.5,
        steps=2,
        epochs=4,
        critic="shared",
        bootstrap=True,
        missing_eos_penalty=0.0,
        value_normalisation=True,
        value_clip=0.0,
        target_kl=1e-4,
        policy_loss="cispo",
        hyper={"ratio_max": 4.0},
        entropy_target=0.5,  # the tiny model's is 5: the bonus is left out
        whiten_advantages=False,
        kl="k3",
        learning_rate=1e-2,
        save_rollouts=True,
        top_k=250,
    )
    assert not (config.output / "critic").exists()
    assert max(line["parity/max"] for line in lines) < 1e-5  # at the first rollout, and where the run evaluates
    found = data.rollouts.read(config.output / "rollouts")
    assert found.columns["step"] == [1] * 8 + [2] * 8 and found.prompts[:8:2] == found.prompts[1:8:2]
    np.testing.assert_allclose(found.rewards, 2.0 * found.parts["rule"] + 0.5 * found.parts["model"], rtol=1e-6)
    assert all(1 <= line["updates"] < 8 for line in lines)
    assert [line["values/clip_fraction"] for line in lines] == [0, 0]
    assert all(line["entropy/before"] > 0.5 and line["entropy_weight"] == 0 for line in lines)
    held_out = {name.removeprefix("held_out/"): value for name, value in result.items()}
    for line in [*lines, held_out]:
        total = 2.0 * line["reward/rule"] + 0.5 * line["reward/model"]
        assert line["reward"] == pytest.approx(total, rel=1e-4, abs=1e-6)


def test_ppo_critic_from_the_policy(tiny_folder):
    config = ppo.Config(model="", data="", output="", critic="policy", **PPO)
    loaded = hf.load(tiny_folder)
    learner = actor_critic.make_learner(config, loaded, None, sharding.make_mesh())
    critic = learner.critic(learner.states)
    assert not differs(critic["backbone"], loaded.params) and not differs(learner.policy(learner.states), loaded.params)
    assert np.ptp(critic["score"]["kernel"]) > 0 and "head" not in critic["backbone"]


@pytest.mark.parametrize("scaling", ["none", "start", "running"])
def test_ppo_scales_scores(scaling):
    """Two rollouts; the last row of the second is a filler. The penalty comes first, the clip last."""
    config = ppo.Config(model="", data="", output="", reward_scaling=scaling, reward_clip=1.2, missing_eos_penalty=0.5)
    scale, seen = experience.make_scale(config), moments.Moments.init()
    scores = np.float32([[1.0, 2.0, 4.0, 0.0], [3.0, -1.0, 1.0, 100.0]])
    finished = np.array([[True, True, False, True], [True, True, True, True]])
    weights = np.float32([[1, 1, 1, 1], [1, 1, 1, 0]])
    judged = scores - 0.5 * ~finished
    first, both = judged[0], np.concatenate([judged[0], judged[1, :3]])
    expected = {
        "none": judged,
        "start": (judged - first.mean()) / first.std(ddof=1),
        "running": judged / np.array([[first.std(ddof=1)], [both.std(ddof=1)]]),
    }[scaling]
    for given, ended, weight, wanted in zip(scores, finished, weights, np.clip(expected, -1.2, 1.2)):
        found, seen = scale(seen, jnp.array(given), jnp.array(ended), jnp.array(weight))
        np.testing.assert_allclose(found[:3], wanted[:3], rtol=1e-5)


def write_rules(folder, name):
    """A rule of the user's own."""
    path = folder / "mine.py"
    path.write_text(
        "def vowels(prompts, completions, *, answer, truncated, **_):\n"
        "    assert len(answer) == len(truncated) == len(prompts)\n"
        "    return [sum(c in 'aeiou' for c in text) / 8 for text in completions]\n"
        "def few(prompts, completions, **_):\n    return [0.0]\n"
    )
    return f"{path}:{name}"


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "no reward: give --reward-model FOLDER, --reward RULE, or both"),
        ({"reward": "vowels"}, "--critic reward_model needs --reward-model"),
        (
            {"reward": "vowels", "critic": "policy", "bootstrap": True},
            r"missing_eos_penalty=1\.0.*set the penalty to 0",
        ),
        ({"reward": "vowels", "critic": "shared", "critic_warmup": 1}, "--critic shared has no critic_warmup"),
        ({"reward": "vowels", "critic": "policy", "epochs": 0}, "epochs=0; expected 1 or more"),
        ({"reward": "vowels", "critic": "policy", "clip_high": float("nan")}, "clip_high=nan; expected 0 or more"),
        (
            {"reward": "vowels", "critic": "policy", "kl_coef": 0.0, "kl_target": 6.0},
            "kl_target needs a kl_coef above 0",
        ),
        ({"reward": "vowels", "critic": "policy", "critic_warmup": 100}, "critic_warmup=100; expected 99 or less"),
        (
            {"reward": "vowels", "critic": "policy", "epochs": 1, "minibatches": 1, "target_kl": 0.1},
            "a rollout has only one update",
        ),
        (
            {"reward": "vowels", "critic": "policy", "penalty_weight": 1.0},
            "penalty_weight: ppo_clip has no penalty; expected ppo_penalty or ppo_hybrid",
        ),
        (
            {"reward": "vowels", "critic": "policy", "policy_loss": "ppo_penalty", "penalty_target": 0.01},
            "penalty_target needs a penalty_weight above 0",
        ),
        (
            {"reward": "vowels", "critic": "policy", "policy_loss": "ppo_penalty", "penalty_weight": 1.0, "epochs": 1}
            | {"minibatches": 1},
            "a rollout has only one update",
        ),
        (
            {"reward": "vowels", "critic": "policy", "hyper": {"ratio_max": 4.0}},
            r"hyper \['ratio_max'\]: unknown to --policy-loss ppo_clip; expected some of \['clip_high'",
        ),
        (
            {"reward": "vowels", "critic": "policy", "hyper": {"dual_clip": 1.0}},
            r"dual_clip=1; expected a number above",
        ),
        (
            {"reward": "vowels", "critic": "policy", "policy_loss": "vespo", "clip_low": 0.2},
            "unknown to --policy",
        ),
        ({"reward": "vowels", "critic": "policy", "policy_loss": "reinforce", "epochs": 4}, "reinforce with epochs=4"),
        (
            {"reward": "vowels", "critic": "policy", "entropy_target": 1.0, "entropy_weight": 2.0},
            r"entropy_weight=2\.0; expected 1 or less",
        ),
        (
            {"reward": "vowels", "critic": "policy", "entropy_step": 0.0},
            r"entropy_step=0\.0; expected a number above 0",
        ),
        ({"reward": "vowels", "critic": "policy", "kl_coef": -0.1}, r"kl_coef=-0\.1; expected 0 or more"),
        ({"reward": "vowels", "critic": "policy", "lambda_": 1.5}, r"lambda_=1\.5; expected 1 or less"),
        ({"reward": "vowels", "critic": "policy", "temperature": 0.0}, r"temperature=0\.0; expected a number above 0"),
        ({"reward": "vowels", "critic": "policy", "minibatches": 3}, "8 rows do not divide into 3 parts"),
        (
            {"reward": "vowels", "critic": "policy", "max_new_tokens": 4096},
            "max_new_tokens=.*; expected at most 2048, the policy's context",
        ),
        ({"reward_model": "itself"}, "a language model; expected a reward model"),
    ],
)
def test_ppo_refuses(tiny_folder, tmp_path, change, message):
    data = write(tmp_path / "data.jsonl", prompts(12))
    if "reward" in change:
        change = change | {"reward": write_rules(tmp_path, change["reward"])}
    if "reward_model" in change:
        change = change | {"reward_model": str(tiny_folder)}
    config = {"model": str(tiny_folder), "data": data, "output": tmp_path / "out"} | PPO | change
    with pytest.raises(ValueError, match=message):
        ppo.main(ppo.Config(**config))
    assert not (tmp_path / "out").exists()


def test_a_reward_model_that_says_nan_and_a_rule_that_says_too_little(tiny_folder, reward_folder, tmp_path):
    loaded = hf.load(reward_folder / "model")
    loaded.params["score"]["kernel"] = jnp.full((16, 1), jnp.nan)
    hf.save(tmp_path / "nan", loaded.model, loaded.params, loaded.tokenizer)
    _, part = rollouts.learned(str(tmp_path / "nan"), 1.0, hf.load(tiny_folder).tokenizer, size=2)
    ones = jnp.ones((2, 4), jnp.int32)
    rows = sampling.Samples(ones, ones, ones > 0, 0.0 * ones, ones[:, 0], ones[:, 0] > 0)
    with pytest.raises(ValueError, match="reward reward_model returned nan for row 0, prompt 'one', completion 'a'"):
        part.score(["one", "two"], ["a", "b"], rows, {})
    few = rollouts.rule(write_rules(tmp_path, "few"), 1.0)
    with pytest.raises(ValueError, match="reward few returned 1 numbers for 2 completions"):
        few.score(["one", "two"], ["a", "b"], rows, {})


def test_a_reward_model_is_no_policy(tiny_folder, reward_folder, tmp_path):
    data, folder = write(tmp_path / "data.jsonl", prompts(12)), str(reward_folder / "model")
    config = {"model": folder, "data": data, "output": tmp_path / "out"}
    for main, given in (
        (ppo.main, ppo.Config(**config | PPO, reward_model=folder)),
        (grpo.main, grpo.Config(**config, reward="last_number")),
        (sft.main, sft.Config(**config)),
        (preference.main, preference.Config(**config)),
    ):
        with pytest.raises(ValueError, match="a reward model; expected a language model"):
            main(given)
    assert not (tmp_path / "out").exists()


def test_pairs_are_scored_where_a_sampled_row_ends():
    """A template may write a line end after EOS; the policy's rows end on EOS."""
    row = data.TokenRow(np.arange(6), np.array([False, False, True, True, False, False]))
    np.testing.assert_array_equal(reward_model.up_to_the_end(row).tokens, [0, 1, 2, 3])
    np.testing.assert_array_equal(reward_model.up_to_the_end(row).mask, [False, False, True, True])


def test_metrics_of_several_updates():
    parts = [{"ratio": jnp.array(1.0), "ratio/max": jnp.array(x)} for x in (2.0, 6.0)]
    found = rollouts.mean_of(parts)
    assert (found["ratio"], found["ratio/max"], found["updates"]) == (1.0, 6.0, 2)


def test_ppo_refuses_a_reward_model_of_other_tokens(tiny_folder, reward_folder, tmp_path):
    """Two letters changed places; then there is no tokenizer at all."""
    other = shutil.copytree(reward_folder / "model", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = write(tmp_path / "data.jsonl", prompts(12))
    options = {"data": data, "output": tmp_path / "out", "reward_model": str(other)}
    config = ppo.Config(model=str(tiny_folder), **PPO | options)
    with pytest.raises(ValueError, match=r"reads the policy's tokens, but the vocabularies differ: token .* is '[AB]'"):
        ppo.main(config)
    for path in other.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="no tokenizer; expected the policy's"):
        ppo.main(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"evaluate_every": 0}, "evaluate_every=0; expected at least 1"),
        ({"held_out": 0.0}, r"held_out=0\.0; expected a fraction between 0 and 1"),
        ({"batch_size": 3, "microbatches": 2}, "3 rows do not divide into 2 parts"),
        ({"limit": 4096}, "limit=4096; expected at most 2048, the model's context"),
        ({"limit": 5}, "30 rows read, 0 kept, 30 dropped.*expected at least one row to train on"),
        ({"hyper": {"label_smoothing": 0.9}}, r"label_smoothing=0\.9; expected 0 <= label_smoothing < 0\.5"),
        (
            {"loss": "ipo", "hyper": {"label_smoothing": 0.1}},
            r"hyper \['label_smoothing'\]: unknown to --loss ipo; expected",
        ),
        ({"beta": 0.0}, r"beta=0\.0; expected a number above 0"),
        ({"loss": "dop"}, "loss='dop'; expected one of alphapo, aot"),
        ({"loss": "simpo", "divergence": "alpha"}, "divergence='alpha': simpo is not a function of log-ratios"),
        ({"loss": "aot", "wpo": True}, "wpo: aot needs the whole batch"),
        ({"loss": "aot", "microbatches": 2}, "microbatches=2: aot compares all pairs of a batch"),
        ({"loss": "orpo", "reference": "soft"}, "reference='soft': orpo has no reference; expected fixed"),
        ({"nll_weight": -1.0}, r"nll_weight=-1\.0; expected 0"),
        ({"nll_weight": float("nan")}, "nll_weight=nan; expected 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan; expected a finite number above 0"),
        ({"max_grad_norm": -1.0}, r"max_grad_norm=-1\.0; expected 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay=inf; expected a finite number"),
        ({"hyper": {"beta": 0.2}, "beta": 0.1}, r"hyper \['beta'\]: also given by flags of their own"),
        ({"divergence": "alpha", "divergence_alpha": 2.0}, "f_alpha: alpha=2; expected 0 <= alpha <= 1"),
        ({"divergence_alpha": 0.3}, "divergence_alpha=0.3 with divergence='reverse_kl'; expected alpha"),
        ({"reference": "soft", "reference_rate": 1.5}, "reference_rate=1.5; expected 1 or less"),
        ({"reference": "sdpo", "stages": 28}, "stages=28; expected at most the 27 pairs to train on"),
        ({"loss": "odpo"}, r"data.jsonl:1: wrong margin.*the loss needs a number there"),
        ({"loss": "mdpo"}, r"data.jsonl:1: wrong degraded_prompt: None; mdpo needs the prompt"),
    ],
)
def test_preference_refuses(tiny_folder, tmp_path, change, message):
    data = write(tmp_path / "data.jsonl", pairs(30))
    config = {"model": str(tiny_folder), "data": data, "output": tmp_path / "out"} | change
    with pytest.raises(ValueError, match=message):
        preference.main(preference.Config(**config))
    assert not (tmp_path / "out").exists()


def test_a_side_is_cut_off_or_not(tiny_folder):
    tokenizer, pair = hf.load(tiny_folder).tokenizer, data.Pair("row", "q", "yes", "no", {"chosen_truncated": True})
    cut, ended = (preference.tokenize(tokenizer, p, limit=40) for p in (pair, pair._replace(columns={})))
    assert cut.chosen.length == ended.chosen.length - 1 and cut.rejected.length == ended.rejected.length
    with pytest.raises(data.BadRow, match="wrong rejected_truncated: 'false'; expected true or false"):
        preference.tokenize(tokenizer, pair._replace(columns={"rejected_truncated": "false"}), limit=40)


def test_sft_refuses_pairs_and_previews_within_the_context(tiny_folder, tmp_path):
    data = write(tmp_path / "pairs.jsonl", pairs(4))
    with pytest.raises(ValueError, match="no texts; expected columns text, prompt and completion, or messages"):
        sft.main(sft.Config(model=str(tiny_folder), data=data, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_preference_refuses_data_without_pairs(tiny_folder, tmp_path):
    data = write(tmp_path / "data.jsonl", texts(4))
    with pytest.raises(ValueError, match="no preference pairs; expected columns chosen and rejected"):
        preference.main(preference.Config(model=str(tiny_folder), data=data, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["sft", "preference", "grpo", "reward_model", "ppo"])
def test_help_explains_every_field(script, tracked, monkeypatch, capsys):
    path = next(name for name in tracked if name == f"experiments/{script}.py")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")  # as `python PATH --help` does, but for the start of a process
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    module = importlib.import_module(script)
    for field in module.Config.__dataclass_fields__:
        assert f"--{field.strip('_').replace('_', '-')}" in printed
    assert "(required)" in printed
