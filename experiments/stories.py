"""Happy endings: DPO, GRPO and PPO on one rule and one small model of stories; how much KL each pays for the reward.

    python experiments/stories.py --model FOLDER --output runs/stories

The model writes the beginnings of stories; the task is to end each in time and with happy words, scored from 0 to 1 by
a rule (happy_endings.py). Endings sampled from two policies and compared by the rule are preference pairs. DPO learns
from the pairs; a reward model learns from the pairs too, and PPO learns from the reward model; GRPO learns from the
rule itself. PPO is also run without each of three practices. All then end beginnings that no run has seen, and the rule
judges. FOLDER is meant to hold stories260K, a Llama of 260 thousand parameters trained on TinyStories.

What came out, with how long it took, is in stories.md. In the output folder: held_out.jsonl, pairs.jsonl, reward/ and a
folder for each run, results.json, stories.png and samples.txt.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import common
import grpo
import happy_endings
import jax
import numpy as np
import ppo
import preference
import reward_model
import tyro

from alignax.io import hf


@dataclasses.dataclass(frozen=True)
class Config:
    """Happy endings."""

    model: str
    """Hugging Face folder of a model that writes stories, or id on the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    beginnings: int = 512
    """Stories of which the beginning is taken, where it has a whole sentence."""
    held_out: int = 128
    """Beginnings for the comparison at the end; no run sees them."""
    opening: str = ""
    """How every beginning starts; needed where the tokenizer puts no BOS before a text."""
    beginning_tokens: int = 64
    """Most tokens of a beginning."""
    max_new_tokens: int = 96
    """Tokens in which an ending has to come to its end."""
    group: int = 8
    """Endings of each beginning: those that pairs are made of, and a group of GRPO."""
    pairs: int = 6
    """Most pairs of each beginning."""
    samples: int = 2
    """Endings of each held-out beginning."""
    reward_steps: int = 150
    """Updates of the reward model, of 32 pairs each."""
    betas: tuple[float, ...] = (0.05, 0.2)
    """DPO's runs: how strongly the reference holds."""
    dpo_steps: int = 40
    """Updates of each."""
    kl_weights: tuple[float, ...] = (0.02, 0.1)
    """GRPO's runs: the weight of the KL in the loss."""
    grpo_steps: int = 24
    """Rollouts of each, with one update."""
    kl_coefs: tuple[float, ...] = (0.02, 0.1)
    """PPO's runs: the weight of the KL in the reward."""
    ppo_steps: int = 20
    """Rollouts of each, with two passes."""
    ablations: bool = True
    """Whether PPO is also run, at the first of its weights, without each of the three practices."""
    learning_rate: float = 5e-4
    """AdamW's peak, for all policies."""
    batch_size: int = 6
    """Prompts of a rollout of GRPO; half the pairs of an update of DPO; a rollout of PPO has as many endings."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the runs: order of the data, sampling, and the comparison at the end."""
    seed: int = 0
    """Of everything before."""


class Trial(NamedTuple):
    """One run of one method, and what it was asked for."""

    method: str
    setting: str
    seed: int
    folder: pathlib.Path


def train_reward_model(config: Config, folder: pathlib.Path) -> pathlib.Path:
    """The reward model of the pairs; its folder."""
    reward_model.main(
        reward_model.Config(
            model=str(folder / "start"),
            data=str(folder / "pairs.jsonl"),
            output=folder / "reward",
            limit=config.beginning_tokens + config.max_new_tokens,
            truncate="keep_start",
            steps=config.reward_steps,
            evaluate_every=config.reward_steps,
            microbatches=4,
            learning_rate=1e-3,
            seed=config.seed,
        )
    )
    return folder / "reward" / "model"


def train_dpo(config: Config, output: pathlib.Path, pairs: str, *, beta: float, seed: int) -> None:
    """DPO from the start on one of the files of pairs."""
    preference.main(
        preference.Config(
            model=str(config.output / "start"),
            data=str(config.output / pairs),
            output=output,
            beta=beta,
            # the ids of a sampled text can be more than were sampled: rows are cut rather than dropped
            limit=config.beginning_tokens + config.max_new_tokens,
            truncate="keep_start",
            steps=config.dpo_steps,
            evaluate_every=config.dpo_steps,
            batch_size=2 * config.batch_size,
            learning_rate=config.learning_rate,
            seed=seed,
        )
    )


def plan(config: Config) -> list[Trial]:
    """All runs, a seed after the other."""
    settings = [("DPO", f"beta {x}") for x in config.betas]
    settings += [("GRPO", f"kl {x}") for x in config.kl_weights]
    settings += [("PPO", f"kl {x}") for x in config.kl_coefs]
    if config.ablations and config.kl_coefs:
        settings += [("PPO without", name) for name in WITHOUT]
    folders = [f"{method} {setting}".lower().replace(" ", "_") for method, setting in settings]
    return [
        Trial(*setting, seed, config.output / f"seed_{seed}" / folder)
        for seed in config.seeds
        for setting, folder in zip(settings, folders)
    ]


def run(config: Config, trial: Trial) -> None:
    """One run, by the script of its method."""
    shared = {"model": str(config.output / "start"), "seed": trial.seed, "learning_rate": config.learning_rate}
    shared["output"] = trial.folder
    prompts = {"data": str(config.output / "beginnings.jsonl"), "max_prompt_tokens": config.beginning_tokens}
    prompts["max_new_tokens"] = config.max_new_tokens
    number = trial.setting.split()[-1]
    if trial.method == "DPO":
        train_dpo(config, trial.folder, "pairs.jsonl", beta=float(number), seed=trial.seed)
    elif trial.method == "GRPO":
        steps = {"steps": config.grpo_steps, "evaluate_every": config.grpo_steps}
        rollout = {"prompts": config.batch_size, "group": config.group, "kl_weight": float(number)}
        grpo.main(grpo.Config(**shared, **prompts, **steps, **rollout, reward=f"{happy_endings.__file__}:happy_ending"))
    else:
        endings = config.batch_size * config.group
        settings = {"prompts": endings, "steps": config.ppo_steps, "epochs": 2, "ema_rate": 0.05}
        settings |= {"critic_learning_rate": 2 * config.learning_rate, "reward_scaling": "start"}
        settings |= {"missing_eos_penalty": 0.0, "kl_coef": config.kl_coefs[0]}
        settings |= {"kl_coef": float(number)} if trial.method == "PPO" else WITHOUT[trial.setting](settings)
        settings["evaluate_every"] = settings["steps"]
        reward = str(config.output / "reward" / "model")
        ppo.main(ppo.Config(**shared, **prompts, **settings, reward_model=reward))


# What PPO is run without; the number of endings that it learns from stays the same.
WITHOUT: dict[str, Callable[[dict], dict]] = {
    "whitened advantages": lambda settings: {"whiten_advantages": False},
    # four times as many updates at the same rate; the reference follows as far over the run
    "large rollouts": lambda settings: {
        "prompts": settings["prompts"] // 4,
        "steps": settings["steps"] * 4,
        "ema_rate": 1 - (1 - settings["ema_rate"]) ** 0.25,
    },
    "a moving reference": lambda settings: {"ema_rate": 0.0},
}


def prepare(config: Config) -> tuple[hf.Loaded, list[str]]:
    """Everything that the runs share, in the output folder; the start and the held-out beginnings.

    The start hardly ever earns more than one happy word, and a reward model of its pairs would know no more than that.
    So a first policy learns from those, and the pairs are of endings of both, as Llama 2's were of several policies.
    """
    folder = config.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output folder {folder} exists and is not empty; name a new one, or remove it")
    start = happy_endings.make_start(config, folder / "start")
    found = happy_endings.make_beginnings(config, start)
    asked, prompts = found[: config.held_out], found[config.held_out :]
    happy_endings.write_lines(folder / "held_out.jsonl", [{"prompt": prompt} for prompt in asked])
    happy_endings.write_lines(folder / "beginnings.jsonl", [{"prompt": prompt} for prompt in prompts])
    draw, key = happy_endings.make_draw(config, start, config.group), jax.random.key(config.seed + 2)
    endings = draw(start.params, prompts, key)
    happy_endings.write_lines(folder / "first_pairs.jsonl", happy_endings.pick_pairs(config, prompts, endings))
    train_dpo(config, folder / "first", "first_pairs.jsonl", beta=config.betas[0], seed=config.seed)
    better = draw(hf.load(folder / "first" / "model").params, prompts, jax.random.fold_in(key, 1))
    endings = {name: np.concatenate([endings[name], better[name]], axis=1) for name in endings}
    happy_endings.write_lines(folder / "pairs.jsonl", happy_endings.pick_pairs(config, prompts, endings))
    train_reward_model(config, folder)
    return start, asked


def main(config: Config) -> list[dict]:
    """Runs the study and returns the lines of its results."""
    begun, folder = time.time(), config.output
    start, asked = prepare(config)
    reward = hf.load(folder / "reward" / "model").params
    key = jax.random.key(config.seed + 3)
    found = happy_endings.make_draw(config, start, config.group)(start.params, asked, key, reward)
    accuracy = happy_endings.pair_accuracy(found)
    print("reward model on held-out beginnings:", common.table([accuracy]), sep="\n")

    draw = happy_endings.make_draw(config, start, config.samples)
    trials = [Trial("start", "", seed, folder / "start") for seed in config.seeds] + plan(config)
    points, samples = [], {}
    for trial in trials:
        if trial.method != "start":
            run(config, trial)
        params = start.params if trial.method == "start" else hf.load(trial.folder / "model").params
        endings = draw(params, asked, jax.random.fold_in(key, trial.seed), reward)
        points.append(happy_endings.measure(trial, endings))
        samples.setdefault(f"{trial.method} {trial.setting}", endings)
        (folder / "results.json").write_text(json.dumps({"reward_model": accuracy, "runs": points}, indent=2) + "\n")
    happy_endings.draw_picture(folder / "stories.png", points)
    with (folder / "samples.txt").open("w") as file:
        for row, prompt in enumerate(asked[:8]):
            file.write(f"== {prompt}\n")
            for name, endings in samples.items():
                file.write(f"-- {name}: {endings['reward'][row, 0]:.2f}\n{endings['text'][row, 0]}\n")
    print(f"{common.table(happy_endings.over_seeds(points))}\n{(time.time() - begun) / 60:.0f} minutes; {folder}")
    return points


if __name__ == "__main__":
    main(tyro.cli(Config))
