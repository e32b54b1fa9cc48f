"""Every script runs whole on a tiny model, leaves what it promises, and refuses what it should."""

import json
import os
import subprocess
import sys

import grpo
import numpy as np
import preference
import pytest
import sft

from alignax.io import hf


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count):
    return [{"text": f"line {i} of a text " + "ab" * (i % 5)} for i in range(count)]


def pairs(count):
    return [{"prompt": f"q{i}: ", "chosen": "yes " * (1 + i % 3), "rejected": f"no {i}"} for i in range(count)]


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
        limit=40,
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


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_preference(tiny_folder, tmp_path, capsys, loss):
    config = preference.Config(
        model=str(tiny_folder),
        data=write(tmp_path / "data.jsonl", pairs(20)),
        output=tmp_path / "out",
        loss=loss,
        bfloat16=loss == "ipo",
        steps=4,
        batch_size=4,
        limit=40,
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
    command = [sys.executable, grpo.__file__, "--model", tiny_folder, "--output", tmp_path / "out", "--model-axis", "2"]
    command += ["--data", write(tmp_path / "data.jsonl", prompts(12)), "--reward", f"{tmp_path / 'mine.py'}:size"]
    command += "--steps 1 --warmup 0 --prompts 4 --group 4 --minibatches 2 --max-new-tokens 4".split()
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"evaluate_every": 0}, "evaluate_every=0; expected at least 1"),
        ({"held_out": 0.0}, r"held_out=0\.0; expected a fraction between 0 and 1"),
        ({"batch_size": 3, "microbatches": 2}, "3 rows do not divide into 2 parts"),
        ({"limit": 4096}, "limit=4096; expected at most 2048, the model's context"),
        ({"limit": 5}, "30 rows read, 0 kept, 30 dropped.*expected at least one row to train on"),
        ({"label_smoothing": 0.9}, r"label_smoothing=0\.9; expected 0 to below 0\.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "and 0 for any loss but dpo"),
        ({"beta": 0.0}, r"beta=0\.0; expected a number above 0"),
    ],
)
def test_preference_refuses(tiny_folder, tmp_path, change, message):
    data = write(tmp_path / "data.jsonl", pairs(30))
    config = {"model": str(tiny_folder), "data": data, "output": tmp_path / "out"} | change
    with pytest.raises(ValueError, match=message):
        preference.main(preference.Config(**config))
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("script", ["sft", "preference", "grpo"])
def test_help_explains_every_field(script, tracked):
    path = next(name for name in tracked if name == f"experiments/{script}.py")
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    module = {"sft": sft, "preference": preference, "grpo": grpo}[script]
    for field in module.Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout
    assert "(required)" in done.stdout
