"""Scripts go on from a checkpoint to the same bytes: state, reference, running means, the place in the data."""

import filecmp
import json
import shutil

import kto
import preference
import pytest
import reward_model
import sft

# Of about the same length: one shape to compile.
TEXTS = [{"text": f"line {i} of a text, " + "ab" * (4 + i % 3)} for i in range(9)]
PAIRS = [{"prompt": f"question {i}: ", "chosen": "yes " * (4 + i % 3), "rejected": f"no, no {i}"} for i in range(9)]
CASES = {
    "sft": (sft, TEXTS, {"lora_rank": 2, "lora_dropout": 0.1, "pack": 80}),
    # From the middle of the second stage, with the reference of that and the moments of both.
    "preference": (preference, PAIRS, {"reference": "sdpo", "steps": 6, "loss": "beta_dpo", "share_prompts": False}),
    "reward_model": (reward_model, PAIRS, {}),
    "kto": (kto, PAIRS, {"loss": "bco"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_script_goes_on_to_the_same_bytes(case, tiny_folder, tmp_path, bare, capsys):
    """A finished run whose last two steps are taken away does them again, across the border of an epoch."""
    script, rows, options = CASES[case]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"model": str(tiny_folder), "data": str(tmp_path / "data.jsonl"), "limit": 40, "held_out": 0.3}
    length = {"steps": 4, "batch_size": 4, "evaluate_every": 2, "checkpoint_every": 2}
    rate = {"learning_rate": 1e-2, "warmup": 1}
    options = data | length | rate | options
    config, steps = script.Config(**options, output=tmp_path / "out", resume="auto"), options["steps"]
    result = script.main(config)
    kept = tmp_path / "kept"
    shutil.copytree(config.output, kept)
    for name in (f"checkpoints/{steps}", "model"):
        shutil.rmtree(config.output / name)
    (config.output / "result.json").unlink()
    assert script.main(config) == result
    assert f"goes on from step {steps - 2}" in capsys.readouterr().out
    files = ["metrics.jsonl", "result.json", "model/model.safetensors"]
    assert filecmp.cmpfiles(kept, config.output, files, shallow=False) == (files, [], [])
    assert [json.loads(line)["step"] for line in (kept / "metrics.jsonl").read_text().splitlines()] == list(
        range(steps + 1)
    )
