"""What scripts that sample share: filters and stops, bfloat16 beside float32, parity at the first step, files."""

import json
import re

import grpo
import jax
import jax.numpy as jnp
import numpy as np
import online_preference
import ppo
import pytest
import rollouts
from transformers import AutoTokenizer

from alignax import data, sampling
from alignax.io import hf

SMALL = {"steps": 2, "prompts": 4, "max_new_tokens": 5, "evaluate_every": 2, "warmup": 1, "held_out": 0.3}
SMALL |= {"save_rollouts": True, "learning_rate": 1e-2}


def files(folder):
    """Five prompts to train on, so that the second rollout has filler rows, and a reward."""
    lines = [json.dumps({"prompt": f"say {'very ' * (i % 2)}{i}"}) for i in range(7)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "mine.py").write_text(
        "def vowels(prompts, completions, **_):\n"
        "    return [sum(c in 'aeiou' for c in text) / 8 for text in completions]\n"
    )
    return {"data": str(folder / "data.jsonl"), "output": folder / "out", "reward": f"{folder / 'mine.py'}:vowels"}


def test_grpo_samples_in_bfloat16_and_keeps_what_it_samples(tiny_folder, tmp_path):
    options = {"group": 2, "rollout_bfloat16": True, "top_k": 200, "stop": ("e", "ab")}
    config = grpo.Config(model=str(tiny_folder), **files(tmp_path), **SMALL, **options)
    grpo.main(config)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    names = {f"parity/{name}" for name in ("max", "mean", "k3", "outside")}
    # of the first rollout, and where it evaluates
    assert [names & line.keys() for line in lines] == [set(), names, names]
    saved = sorted(x.name for x in (config.output / "rollouts").iterdir())
    assert saved == ["step-000001.parquet", "step-000002.parquet"]
    found = data.rollouts.read(config.output / "rollouts")
    assert found.columns["step"] == [1] * 8 + [2] * 8 and sum(found.columns["weight"]) == 10
    assert found.prompts is not None and all(prompt.startswith("say ") for prompt in found.prompts)
    assert found.prompts[::2] == found.prompts[1::2] and len(set(found.prompts)) == 5
    assert found.parts.keys() == {"rule"}
    expected = [sum(c in "aeiou" for c in text) / 8 for text in found.completions]
    np.testing.assert_array_equal(found.rewards, np.float32(expected))
    for step in (1, 2):
        counted = (np.array(found.columns["step"]) == step) & (np.array(found.columns["weight"]) > 0)
        assert lines[step]["reward"] == pytest.approx(found.rewards[counted].mean(), rel=1e-5)
    # the size of bfloat16's rounding: neither that of float32 nor a bug's
    assert 1e-4 < lines[1]["parity/max"] < 0.05 and 1e-9 < lines[1]["parity/k3"] < 1e-3
    assert np.any(np.abs(found.processed_logp - found.logp) > 0.01)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_mixture_in_bfloat16(tiny_folder, monkeypatch, bfloat16):
    """Its two networks are cast, and the model computes in it; the weight and the trainer's model stay as they are."""
    seen = []
    monkeypatch.setattr(sampling, "generate", lambda model, params, *asked, **settings: seen.append((model, params)))
    options = {"model": "", "data": "", "output": "", "rollout_bfloat16": bfloat16}
    loaded, dtype = hf.load(tiny_folder), jnp.bfloat16 if bfloat16 else jnp.float32
    policies = {"policy": loaded.params, "reference": loaded.params, "weight": jnp.asarray(0.3)}
    config = online_preference.Config(**options)
    rollouts.make_sample(config, loaded, mixed=True)(policies, jnp.ones((1, 1)), jnp.ones(1), jax.random.key(0))
    ((model, params),) = seen
    assert params["weight"].dtype == jnp.float32 and params.keys() == policies.keys()
    assert {x.dtype for x in jax.tree.leaves([params["policy"], params["reference"]])} == {jnp.dtype(dtype)}
    assert model.config.dtype == dtype and loaded.model.config.dtype == jnp.float32


def test_stops_are_spelled_by_the_tokenizer(tiny_folder):
    loaded = hf.load(tiny_folder)
    spelled = rollouts.stop_ids(loaded.tokenizer, ("ab", " e", "\n"), 2)
    assert [loaded.tokenizer.decode(ids) for ids in spelled] == ["ab", " e", "\n"]
    special = rollouts.stop_ids(loaded.tokenizer, ("<pad>", "<eos>"), 2)
    assert special == [[loaded.tokenizer.pad_token_id], [loaded.tokenizer.eos_token_id]]
    with pytest.raises(ValueError, match="stop 'abc' has 3 tokens; expected at most max_new_tokens=2"):
        rollouts.stop_ids(loaded.tokenizer, ("a", "abc"), 2)


def test_stops_are_found_as_text_spells_them(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tokenizers" / "gpt2")
    for stop, text in (("END", "THE END"), ('"', 'said "hi." ok'), ("}", "{ x };"), ("\n\n", "It is so.\n\nThe next")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spelled = rollouts.stop_ids(tokenizer, (stop,), 4)
        assert any(ids[i : i + len(one)] == one for one in spelled for i in range(len(ids))), (stop, text)


OWN = [(grpo, {"reward": "last_number"}), (ppo, {"reward": "last_number", "critic": "policy"})]
OWN += [(online_preference, {"reward": "last_number"})]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": -1}, "top_k=-1; expected 0 or more"),
        ({"top_k": 2**31}, "top_k=2147483648; expected 2147483647 or less"),
        ({"top_p": 0.0}, "top_p=0.0; expected a number above 0"),
        ({"top_p": float("nan")}, "top_p=nan; expected 0 or more"),
        ({"min_p": 2.0}, "min_p=2.0; expected 1 or less"),
        ({"temperature": float("inf")}, "temperature=inf; expected a finite number"),
        ({"stop": ("a", "")}, "stop=('a', ''); expected texts, none of them empty"),
    ],
)
@pytest.mark.parametrize(("script", "own"), OWN)
def test_options_are_refused_before_anything_is_loaded(script, own, wrong, message, tmp_path):
    config = script.Config(model="nowhere", data="nowhere", output=tmp_path / "out", **own, **wrong)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        script.main(config)
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_sampler(tiny_folder, monkeypatch):
    seen = {}
    monkeypatch.setattr(sampling, "generate", lambda model, params, *asked, **settings: seen.update(settings))
    options = {"top_p": 0.9, "top_k": 7, "min_p": 0.1, "temperature": 0.8, "max_new_tokens": 6}
    config = grpo.Config(model="", data="", output="", reward="", stop=("ab",), group=3, **options)
    loaded = hf.load(tiny_folder)
    rollouts.make_sampler(config, loaded).sample(loaded.params, jnp.ones((1, 1)), jnp.ones(1), jax.random.key(0))
    stop = [loaded.tokenizer("ab")["input_ids"]]
    assert seen == options | {"group": 3, "stop": stop, "eos_ids": loaded.eos_ids}
