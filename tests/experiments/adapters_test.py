"""`--lora-rank`: the scripts train adapters, leave the weights as they are, and write both, apart and merged."""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import adapters
import common
import grpo
import jax
import numpy as np
import preference
import pytest
import sft

from alignax.io import hf, peft
from alignax.models import LoraConfig

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
FIXED = {"steps": 2, "held_out": 0.2, "evaluate_every": 2, "warmup": 0, "learning_rate": 1e-2}
ADAPTED = {"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": "layers/attn/(q|v)/kernel"}


def run(script, folder, tmp_path, rows, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(folder), "data": str(path), "output": tmp_path / "out", **FIXED, **ADAPTED}
    script.main(script.Config(**given | options))
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def check_output(folder, output, *, rank=2, alpha=8.0, dropout=0.0):
    """The model is the one before, but for the adapters' kernels, which have moved by scale a b."""
    before, after = hf.load(folder), hf.load(output / "model")
    found, config = peft.load(output / "adapter", before.model)
    assert (config.rank, config.alpha, config.dropout) == (rank, alpha, dropout)
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder
    )
    expected = jax.tree.map(np.array, before.params)
    for name in ("q", "v"):
        a, b = (np.asarray(found["layers"]["attn"][name][leaf]) for leaf in ("lora_a", "lora_b"))
        assert a.shape[-1] == rank and np.all(np.any(b, axis=(1, 2)))
        expected["layers"]["attn"][name]["kernel"] += alpha / rank * np.einsum("lir,lro->lio", a, b)
    assert set(found["layers"]["attn"]) == {"q", "v"} and set(found) == {"layers"}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), after.params, expected)
    untouched = ("embed", "final_norm")
    jax.tree.map(np.testing.assert_array_equal, *({n: p[n] for n in untouched} for p in (after.params, before.params)))


@pytest.fixture
def shown(monkeypatch):
    """The weights that `show` was given; it samples nothing, which is another test's, and takes a while to compile."""
    found = []
    monkeypatch.setattr(common, "make_show", lambda *_: lambda title, params, key: found.append(params))
    return found


def check_shown(shown):
    assert len(shown) == 2 and all({"kernel", "lora_a"} <= set(p["layers"]["attn"]["q"]) for p in shown)


def test_sft_trains_adapters_with_dropout(tiny_folder, tmp_path, capsys, shown):
    rows = [{"text": f"line {i} " + "ab" * (i % 3)} for i in range(10)]
    shape = {"batch_size": 4, "microbatches": 2, "limit": 16, "lora_dropout": 0.25}
    lines = run(sft, tiny_folder, tmp_path, rows, **shape)
    check_output(tiny_folder, tmp_path / "out", dropout=0.25)
    check_shown(shown)
    assert lines[2]["held_out/loss"] < lines[0]["held_out/loss"]
    # two layers, q of 16 x 16 and v of 16 x 8: rank 2 makes 2 * 2 * (32 + 24) numbers
    assert "adapters: 224 numbers are trained" in capsys.readouterr().out


def test_the_reference_of_preferences_is_the_model_without_adapters(tiny_folder, tmp_path, capsys, shown):
    rows = [{"prompt": f"{i}? ", "chosen": "yes", "rejected": "no"} for i in range(15)]
    lines = run(preference, tiny_folder, tmp_path, rows, batch_size=4, limit=16)
    check_output(tiny_folder, tmp_path / "out")
    check_shown(shown)
    assert "in updates a prompt runs once for both sides of its pair" in capsys.readouterr().out
    np.testing.assert_allclose(lines[1]["rewards/margins"], 0, atol=1e-6)  # b is 0: the base itself
    np.testing.assert_allclose(lines[0]["held_out/loss"], np.log(2), rtol=1e-5)
    assert lines[2]["rewards/margins"] > 0 and lines[2]["held_out/loss"] < np.log(2)


def test_grpo_samples_with_the_adapters(tiny_folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def vowels(prompts, completions, **_):\n    return [sum(c in 'aeiou' for c in text) for text in completions]\n"
    )
    rows = [{"prompt": f"say {i}"} for i in range(6)]
    shape = {"prompts": 4, "group": 2, "max_new_tokens": 6, "reward": f"{tmp_path / 'mine.py'}:vowels"}
    lines = run(grpo, tiny_folder, tmp_path, rows, **shape, learning_rate=1e-1)
    check_output(tiny_folder, tmp_path / "out")
    assert abs(lines[1]["kl"]) < 1e-6 < lines[2]["kl"] and lines[2]["held_out/kl"] != 0
    assert lines[1]["parity/max"] < 1e-4


def test_what_has_no_peft_form_is_only_merged(tmp_path, capsys):
    """GPT-2 keeps q, k and v in one tensor: known before training, and no reason not to train."""
    loaded = hf.load(VECTORS / "hf" / "gpt2")
    config = sft.Config(model="", data="", output=tmp_path, lora_rank=1)
    trained = adapters.arrange(config, loaded)
    assert "only OUTPUT/model is written, not OUTPUT/adapter (peft: the architecture keeps" in capsys.readouterr().out
    start = trained.initial(loaded.params)
    trained.save(tmp_path, loaded, start, "name")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    saved = hf.load(tmp_path / "model").params
    jax.tree.map(np.testing.assert_array_equal, saved, loaded.params)  # b is 0
    fitting = dataclasses.replace(config, lora_targets="mlp/(up|down)/kernel")
    assert adapters.arrange(fitting, loaded).exports


def test_dropout_has_a_key_for_each_update():
    config = LoraConfig(rank=1, dropout=0.1)
    trained, states = adapters.Adapters(config, {}, jax.random.key(0)), [SimpleNamespace(step=n) for n in (0, 1)]
    first, second = (trained.hyper({"beta": 1.0}, state) for state in states)
    assert first.keys() == second.keys() == {"beta", "dropout_key"}
    assert first["dropout_key"] != second["dropout_key"]
    still = trained._replace(config=dataclasses.replace(config, dropout=0.0))
    assert still.hyper({}, states[0]) == adapters.Adapters().hyper({}, states[0]) == {}


@pytest.mark.parametrize(
    "script, options, message",
    [
        (sft, {"lora_rank": 0}, r"\['lora_alpha', 'lora_targets'\] with lora_rank=0"),
        (sft, {"lora_rank": -1}, "lora_rank=-1; expected 0 or more"),
        (sft, {"lora_dropout": 1.0}, "dropout=1.0; expected a probability"),
        (preference, {"reference": "ema"}, "reference='ema' with lora_rank=2: the reference is the base"),
        (grpo, {"ema_rate": 0.1, "reward": "last_number"}, "ema_rate=0.1 with lora_rank=2: the reference is the base"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, script, options, message):
    given = {"model": "unread", "data": "unread", "output": tmp_path / "out", **FIXED, **ADAPTED}
    with pytest.raises(ValueError, match=message):
        script.main(script.Config(**given | options))
    assert not (tmp_path / "out").exists()


def test_targets_that_are_none_are_refused_before_anything_is_written(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="targets 'experts' match no parameter"):
        run(preference, tiny_folder, tmp_path, [], lora_targets="experts", cache_reference=tmp_path / "cache")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
