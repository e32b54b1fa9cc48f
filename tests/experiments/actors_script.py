"""Run by actors_test.py in a process of four simulated devices: grpo.py with actors and without. Prints JSON."""

import json
import pathlib
import shutil
import sys

import actors
import grpo
import jax
from tiny_folder import save_tiny_model

REWARD = """
def vowels(prompts, completions, **_):
    return [sum(letter in "aeiou" for letter in text) for text in completions]
"""


def run(folder, name, *, steps, **options):
    """A run's lines and the bytes of its model."""
    common = {"reward": f"{folder}/mine.py:vowels", "prompts": 4, "group": 2, "max_new_tokens": 6, "kl": "none"}
    common |= {"evaluate_every": 9, "evaluate_prompts": 2, "learning_rate": 1e-2, "warmup": 1, "share_prompts": False}
    where = {"model": str(folder / "tiny"), "data": str(folder / "data.jsonl"), "output": folder / name}
    grpo.main(grpo.Config(**where, **common, steps=steps, **options))
    return read(folder / name)


def read(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    return lines, (output / "model" / "model.safetensors").read_bytes()


def main(folder):
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[2] / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the runs here are of the same programs
    save_tiny_model(folder / "tiny")
    (folder / "mine.py").write_text(REWARD)
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(10)))

    learners = actors.learners
    actors.learners = lambda config: jax.devices()[:2]
    lines, model = run(folder, "in turn", steps=2)
    actors.learners = learners
    found, same = run(folder, "waiting", steps=2, actors=2, staleness=0)
    report = {"in turn": lines, "waiting": found, "same": model == same}

    kept = {"checkpoint_every": 2, "keep": 3, "resume": "auto"}
    lines, model = run(folder, "ahead", steps=3, actors=2, **kept)
    # what a run leaves that dies in the third step, but for lines that it would have lost
    shutil.copytree(folder / "ahead", folder / "dead")
    shutil.rmtree(folder / "dead" / "checkpoints" / "3")
    shutil.rmtree(folder / "dead" / "model")
    (folder / "dead" / "result.json").unlink()
    again, same = run(folder, "dead", steps=3, actors=2, **kept)
    return report | {"ahead": lines, "again": again, "resumed": model == same, "numbers": tiny_numbers(folder)}


def tiny_numbers(folder):
    """How many numbers the model has, told from the header of its file."""
    data = (folder / "tiny" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    tensors = [x for name, x in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"]
    return sum((x["data_offsets"][1] - x["data_offsets"][0]) // 4 for x in tensors if x["dtype"] == "F32")


if __name__ == "__main__":
    result = main(pathlib.Path(sys.argv[1]))
    print(json.dumps(result))
