"""What is done to a script's run, and how it must come out: the same files, byte for byte, as of a run left alone.

A trial is a function `(work, case) -> what was seen`; it raises `AssertionError` where the run did not hold.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import restarts
import running
from restarts import Job, Life
from tiny_folder import save_tiny_model  # pyright: ignore[reportMissingImports]

from alignax import sharding

REWARDS = """
def vowels(prompts, completions, **_):
    return [float(sum(c in 'aeiou' for c in text)) for text in completions]
def prefer(prompts, first, second, **_):
    return [0.5 + 0.4 * ((a > b) - (a < b)) for a, b in zip(first, second)]
"""
ROWS = {  # {} stands for the folder of inputs
    "texts": {"data": "{}/texts.jsonl", "batch_size": 8, "limit": 64},
    "pairs": {"data": "{}/pairs.jsonl", "batch_size": 8, "limit": 64},
    "prompts": {"data": "{}/prompts.jsonl", "prompts": 4, "max_new_tokens": 6, "save_rollouts": True},
}
ALL = {"model": "{}/model", "held_out": 0.2, "evaluate_every": 6, "learning_rate": 1e-2, "warmup": 2, "steps": 24}
VOWELS, PREFER = {"reward": "{}/mine.py:vowels"}, {"prefer": "{}/mine.py:prefer"}
PASSES = {"epochs": 2, "minibatches": 2}
CONTROLLED = {"kl_target": 0.1, "target_kl": 0.05, "entropy_weight": 0.01, "entropy_target": 2.0}
# Every script, with the options that have a state of their own: name -> script, kind of rows, options.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft": ("sft", "texts", {}),
    "sft, four devices": ("sft", "texts", {"fsdp": 2, "sequence": 2}),
    "sft, packed, LoRA dropout": ("sft", "texts", {"pack": 128, "lora_rank": 2, "lora_dropout": 0.2}),
    "dpo": ("preference", "pairs", {"microbatches": 2}),
    "dpo, reference ema": ("preference", "pairs", {"reference": "ema"}),
    "dpo, reference hard, packed": ("preference", "pairs", {"reference": "hard", "reference_every": 5, "pack": 256}),
    "dpo, sdpo": ("preference", "pairs", {"reference": "sdpo", "stages": 3}),
    "dpo, 8 bits, known reference": ("preference", "pairs", {"optimizer_bits": 8, "precompute_reference": True}),
    "beta_dpo": ("preference", "pairs", {"loss": "beta_dpo"}),
    "reward_model": ("reward_model", "pairs", {}),
    "kto": ("kto", "pairs", {}),
    "bco": ("kto", "pairs", {"loss": "bco"}),
    "grpo": ("grpo", "prompts", {"group": 4, "filter_groups": True, **VOWELS}),
    "grpo, reference ema, passes": (
        "grpo", "prompts", {"group": 4, "ema_rate": 0.1, "correction": "truncated_is_token", **VOWELS, **PASSES}
    ),
    "grpo, LoRA dropout": ("grpo", "prompts", {"group": 4, "lora_rank": 2, "lora_dropout": 0.2, **VOWELS}),
    "ppo": ("ppo", "prompts", {"group": 2, "critic": "policy", "critic_warmup": 3, **VOWELS, **PASSES}),
    "ppo, controllers, moments, ema": (
        "ppo", "prompts",
        {"group": 2, "critic": "policy", "value_normalisation": True, "reward_scaling": "running", "ema_rate": 0.1}
        | CONTROLLED | VOWELS | PASSES,
    ),
    "ppo, shared critic, penalty": (
        "ppo", "prompts",
        {"group": 2, "critic": "shared", "policy_loss": "ppo_penalty", "penalty_weight": 0.3, "penalty_target": 0.01}
        | {"reward_scaling": "start", "epochs": 2} | VOWELS,
    ),
    "online dpo": ("online_preference", "prompts", {"method": "dpo", **PREFER}),
    "nash_ema": ("online_preference", "prompts", {"method": "nash_ema", **PREFER}),
    "sppo": ("online_preference", "prompts", {"method": "sppo", "samples": 3, "reference_every": 5, **VOWELS}),
}  # fmt: skip


def write_inputs(folder: pathlib.Path) -> None:
    """A tiny model, rows of every kind that the scripts read, a reward and a preference."""
    folder.mkdir(parents=True)
    save_tiny_model(folder / "model")
    rows = {
        "texts": [{"text": f"line {i} of a text " + "ab" * (i % 5)} for i in range(40)],
        "pairs": [{"prompt": f"q{i}: ", "chosen": "yes " * (1 + i % 3), "rejected": f"no {i}"} for i in range(40)],
        "prompts": [{"prompt": f"say {i}", "answer": str(i)} for i in range(23)],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "mine.py").write_text(REWARDS)


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Where trials work, by which seed they strike, and which options hold for all runs."""

    folder: pathlib.Path
    seed: int = 0
    kills: int = 20
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def job(self, case: str, name: str, **options: Any) -> Job:
        """A case's run into a folder of its own, which must be new; it saves every other step."""
        script, rows, own = CASES[case]
        given = ALL | ROWS[rows] | own | {"resume": "auto", "checkpoint_every": 2} | self.options | options
        inputs = self.folder / "inputs"
        found: dict[str, Any] = {key: x.format(inputs) if isinstance(x, str) else x for key, x in given.items()}
        devices = math.prod(found.get(axis, 1) for axis in sharding.AXES[1:])
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {"XLA_FLAGS": flags} if devices > 1 else {}
        return Job(script, found, environment).into(self.folder / "runs" / f"{_plain(case)}-{name}")

    def log(self, job: Job) -> pathlib.Path:
        """The file for what the next life of a job prints."""
        folder = self.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{job.output.name}-{sum(1 for _ in folder.glob(f'{job.output.name}-*')):02d}.log"
        file.touch()  # it is this one's, also if another process begins before it says anything
        return file

    def start(self, job: Job) -> Life:
        """Starts a job, or a further life of it."""
        return restarts.start(job, self.log(job))

    def finish(self, job: Job) -> Life:
        """Runs a job to its end, or a further life of it."""
        return restarts.finish(job, self.log(job))

    def rng(self, case: str, trial: str) -> np.random.Generator:
        """What decides when to strike."""
        return np.random.default_rng([self.seed, zlib.crc32(f"{trial} {case}".encode())])

    @functools.cache  # noqa: B019  one object, one run of the command
    def alone(self, case: str) -> "Alone":
        """The same run left alone, and how long its parts took once all is compiled."""
        job = self.job(case, "alone")
        self.finish(self.job(case, "compiles"))
        life = self.start(job)
        life.until(lambda: restarts.lines(job.output) > 0)
        began = life.age
        if life.wait():
            raise RuntimeError(life.said()[-4000:])
        return Alone(job.output, began, (life.age - began) / job.options["steps"])

    def same(self, case: str, job: Job) -> None:
        """Holds a run to the one left alone."""
        found = restarts.differences(self.alone(case).output, job.output)
        assert not found, f"{job.output} differs from the run left alone in {found}"


@dataclasses.dataclass(frozen=True)
class Alone:
    """A run that nothing happened to: its folder, the seconds until its first line and of a step."""

    output: pathlib.Path
    began: float
    step: float


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def saved(folder: pathlib.Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit())


def saving(folder: pathlib.Path) -> bool:
    """Whether a checkpoint is being written now: Orbax renames it when it is whole."""
    with contextlib.suppress(FileNotFoundError):
        return any(not path.name.isdigit() and path.name != "damaged" for path in (folder / "checkpoints").iterdir())
    return False


def killed(work: Work, case: str) -> str:
    """`kill -9` again and again, at random: before anything is there, in a step, in a save; then to the end."""
    rng, alone, job = work.rng(case, "killed"), work.alone(case), work.job(case, "killed")
    struck: list[str] = []
    lost = 0
    while len(struck) < work.kills:
        life = work.start(job)
        where = strike(life, rng, alone)
        if not where:  # it came to its end
            assert life.code == 0, life.said()[-4000:]
            break
        struck.append(where)
        lost += max(0, restarts.lines(job.output) - 1 - newest(job.output))
    work.finish(job)
    work.same(case, job)
    said = ", ".join(f"{struck.count(where)} in {where}" for where in sorted(set(struck)))
    return f"{len(struck)} kills: {said}; {lost} steps made again"


def strike(life: Life, rng: np.random.Generator, alone: Alone) -> str:
    """Kills a process somewhere, and says in what; nothing when it ended first."""
    folder = life.job.output
    where = str(rng.choice(["the start", "a step", "a step", "a save"]))
    opened, goal = stamp(folder), newest(folder) + int(rng.integers(1, 4))
    delay = rng.uniform(0, {"the start": alone.began, "a step": 2 * alone.step, "a save": 0.1}[where])

    def there() -> bool:
        if where == "the start":
            return True
        # the lines of a life before are cut when the folder is opened, before its config.json is written anew
        return stamp(folder) != opened and restarts.lines(folder) > goal and (where != "a save" or saving(folder))

    if not life.until(there):
        return ""
    end = time.monotonic() + delay
    if not life.until(lambda: time.monotonic() > end):
        return ""
    life.kill()
    return where


def stamp(folder: pathlib.Path) -> int:
    """When a run opened the folder last: it writes config.json anew; 0 before the first."""
    file = folder / "config.json"
    return file.stat().st_mtime_ns if file.exists() else 0


def begun(work: Work, case: str, name: str, *, step: int, **options: Any) -> tuple[Job, Life]:
    """A run that has logged a step and works on the next one."""
    job = work.job(case, name, **options)
    life = work.start(job)
    assert life.until(lambda: restarts.lines(job.output) > step), life.said()[-4000:]
    return job, life


def terminated(work: Work, case: str) -> str:
    """SIGTERM: saves, and ends with 75; then to the end."""
    step = int(work.rng(case, "terminated").integers(1, 10))
    job, life = begun(work, case, "terminated", step=step)
    os.kill(life.process.pid, signal.SIGTERM)
    assert life.wait(60) == running.PREEMPTED, f"ended with {life.code}:\n{life.said()[-4000:]}"
    last = newest(job.output)
    assert last == restarts.lines(job.output) - 1, "saved another step than the last that was logged"
    work.finish(job)
    work.same(case, job)
    return f"exit {running.PREEMPTED}, saved at step {last}"


def damaged(work: Work, case: str) -> str:
    """The newest checkpoint cut short, or one byte of it changed: said, and the one before goes on."""
    said = []
    for how in ("cut short", "one bit changed", "a file missing"):
        job, life = begun(work, case, how, step=9)
        life.kill()
        steps = saved(job.output)
        damage(numbers(job.output, steps[-1]), how)
        life = work.finish(job)
        assert "CHECKPOINT DAMAGED" in life.said() and f"goes on from step {steps[-2]}" in life.said(), life.said()
        work.same(case, job)
        said.append(f"{how}: {steps[-1]} -> {steps[-2]}")
    return ", ".join(said)


def numbers(folder: pathlib.Path, step: int) -> pathlib.Path:
    """The file that has the numbers of a checkpoint, or most of them."""
    files = (folder / "checkpoints" / str(step) / "arrays" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def damage(file: pathlib.Path, how: str) -> None:
    """Spoils a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "a file missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if how == "cut short" else content)


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, mebibytes: int = 16) -> Iterator[None]:
    """A file system in memory of that size, at an empty folder.

    Raises:
      PermissionError: when this user may not mount one.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise PermissionError("there is no command mount") from error
    if done.returncode:
        raise PermissionError(f"may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def starved(work: Work, case: str) -> str:
    """The disk is full: the run ends and says so, its last whole checkpoint goes on when there is room again."""
    disk = work.folder / "disk"
    with small_disk(disk):
        job = work.job(case, "starved").into(disk / "run")
        life = work.start(job)
        assert life.until(lambda: restarts.lines(job.output) > 9), life.said()[-4000:]
        code, before = starve(life, disk)
        life = work.finish(job)
        assert f"goes on from step {before}" in life.said(), life.said()[-4000:]
        work.same(case, job)
    return f"exit {code}, went on from step {before}"


def starve(life: Life, disk: pathlib.Path) -> tuple[int, int]:
    """Fills the disk until the run has ended, and makes room again; its exit code, and the step of its checkpoint."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        while life.code is None:  # takes also what the run frees
            with contextlib.suppress(OSError):
                ballast.write(bytes(4096))
    code, said = life.wait(), life.said()
    assert code > 0 and "No space left" in said, f"ended with {code}:\n{said[-4000:]}"
    (disk / "ballast").unlink()
    return code, newest(life.job.output)


def occupied(work: Work, case: str) -> str:
    """Two runs on one folder: the second is refused, the first does not notice."""
    job, life = begun(work, case, "occupied", step=2)
    second = work.start(job)
    code = second.wait(60)
    assert life.code is None, "the first run ended before the second was refused"
    assert code == 1 and "is in use by" in second.said(), f"ended with {code}:\n{second.said()[-4000:]}"
    assert life.wait() == 0, life.said()[-4000:]
    work.same(case, job)
    return second.said().strip().splitlines()[-1].removeprefix("ValueError: ").replace(str(work.folder), "")


def repeated(work: Work, case: str) -> str:
    """The same seed gives the same bits in a second process, another seed gives others."""
    again, other = work.job(case, "again"), work.job(case, "other", seed=1)
    work.finish(again)
    work.same(case, again)
    work.finish(other)
    found = restarts.differences(work.alone(case).output, other.output)
    assert any(name.endswith(".safetensors") for name in found) and "metrics.jsonl" in found, found
    return "same seed: the same bits; another seed: others"


def newest(folder: pathlib.Path) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return max(saved(folder), default=0)
