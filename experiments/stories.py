"""Happy endings: DPO and GRPO on one rule and one small model of stories, and how much KL each pays for the reward.

    python experiments/stories.py --model FOLDER --output runs/stories

The model writes the beginnings of stories; the task is to end each in time and with happy words, scored from 0 to 1 by
a rule, `happy_ending` below. DPO learns from the best and the worst of several endings sampled from the
start, GRPO from the rule itself, each at several weights of the KL; all then end beginnings that no run has seen.
FOLDER is meant to hold stories260K, a Llama of 260 thousand parameters trained on TinyStories.

12 minutes on two CPU cores. One seed, 128 held-out beginnings, standard errors below 0.02: reward 0.09 -> 0.49 with DPO
at beta 0.05 (KL 27 nats per ending, NLL under the start 1.36 -> 1.65 nats per token) and -> 0.56 with GRPO at KL weight
0.1 (KL 21, NLL 1.58). All points are in stories.md.
Out come held_out.jsonl, pairs.jsonl, a folder for each run, results.json, stories.png and samples.txt.
"""

import dataclasses
import json
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import common
import grpo
import jax
import numpy as np
import preference
import tyro
from matplotlib.figure import Figure

from alignax import rewards, sampling
from alignax.data import text
from alignax.io import hf
from alignax.logprobs import token_logprobs

HAPPY = "happy smile smiled laugh laughed fun love loved hug hugged joy proud glad".split()
CHUNK = 64  # prompts sampled from at once


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
    beginning_tokens: int = 128
    """Most tokens of a beginning."""
    max_new_tokens: int = 128
    """Tokens in which an ending has to come to its end."""
    group: int = 8
    """Endings of each beginning: those a pair is picked from, and a group of GRPO."""
    samples: int = 2
    """Endings of each held-out beginning."""
    betas: tuple[float, ...] = (0.05, 0.2, 0.8)
    """DPO's runs: how strongly the reference holds."""
    dpo_steps: int = 30
    """Updates of each."""
    kl_weights: tuple[float, ...] = (0.02, 0.1, 0.5)
    """GRPO's runs: the weight of the KL in the loss."""
    grpo_steps: int = 24
    """Rollouts of each, with one update."""
    learning_rate: float = 5e-4
    """AdamW's peak, for both."""
    batch_size: int = 6
    """Prompts of a rollout of GRPO; half the pairs of an update of DPO."""
    seed: int = 0
    """Of everything."""


def happy_ending(prompts: Sequence[str], endings: Sequence[str], *, truncated: Sequence[bool], **_) -> list[float]:
    """A quarter for each different happy word, up to 1; half of it when the story was cut off before its end.

    A product, not a sum: an empty ending is in time, and a sum would pay for it.
    """
    words = rewards.distinct_words(HAPPY, enough=4)(prompts, endings)
    return [value * (0.5 if cut else 1.0) for value, cut in zip(words, truncated, strict=True)]


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> str:
    """Rows as a JSONL file; its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_start(config: Config, folder: pathlib.Path) -> hf.Loaded:
    """The model as it came, but with a tokenizer whose EOS is the one the model itself ends stories with.

    stories260K ends its texts with BOS. Pairs must end so too, or DPO would teach it a new token, not where to stop.
    """
    loaded = hf.load(config.model)
    sample = partial(sampling.generate, loaded.model, max_new_tokens=384, group=CHUNK, eos_ids=loaded.eos_ids)
    rows = jax.jit(sample)(loaded.params, *text.encode(loaded.tokenizer, [config.opening]), jax.random.key(config.seed))
    tokens, ended = common.to_host((rows.tokens, ~rows.truncated))
    last = np.argmax(np.cumsum(common.to_host(rows.mask), axis=1), axis=1)
    endings = tokens[np.arange(CHUNK), last][ended]
    if len(endings):
        most = int(np.bincount(endings).argmax())
        loaded.tokenizer.eos_token = loaded.tokenizer.convert_ids_to_tokens(most)
    hf.save(folder, loaded.model, loaded.params, loaded.tokenizer)
    return hf.load(folder)


def make_beginnings(config: Config, loaded: hf.Loaded) -> list[str]:
    """Different texts, each of whole sentences and at most `beginning_tokens` tokens, that the model began to write."""
    sample = partial(sampling.generate, loaded.model, max_new_tokens=config.beginning_tokens, eos_ids=loaded.eos_ids)
    prompt = text.encode(loaded.tokenizer, [config.opening])
    rows = jax.jit(partial(sample, group=config.beginnings))(loaded.params, *prompt, jax.random.key(config.seed + 1))
    texts = text.decode(loaded.tokenizer, rows.tokens, rows.mask, eos_ids=loaded.eos_ids)
    bodies = [config.opening + body for body, cut in zip(texts, common.to_host(rows.truncated)) if cut]
    sentences = [re.match(r'.*[.!?]"?', body, re.DOTALL) for body in bodies]
    found = dict.fromkeys(match.group().strip() for match in sentences if match)
    found = [x for x in found if len(text.encode(loaded.tokenizer, [x])[0][0]) <= config.beginning_tokens]
    if len(found) < 2 * config.held_out:
        raise ValueError(f"{len(found)} beginnings with a whole sentence; expected at least {2 * config.held_out}")
    return found


def make_draw(config: Config, start: hf.Loaded, group: int) -> Callable[..., dict[str, np.ndarray]]:
    """Makes `draw(params, prompts, key)`: `group` endings of each prompt, scored; arrays [prompts, group] by name."""
    generate = partial(sampling.generate, start.model, max_new_tokens=config.max_new_tokens, eos_ids=start.eos_ids)
    sample, score = jax.jit(partial(generate, group=group)), jax.jit(partial(token_logprobs, start.model))

    def draw(params, prompts: Sequence[str], key: jax.Array) -> dict[str, np.ndarray]:
        parts = []
        for first in range(0, len(prompts), CHUNK):
            asked = prompts[first : first + CHUNK]
            tokens, lengths = text.encode(start.tokenizer, asked, width=config.beginning_tokens)
            row_ids = np.arange(first * group, (first + len(asked)) * group)
            rows = sample(params, tokens, lengths, key, row_ids=row_ids)
            start_logp = score(start.params, rows.tokens, rows.segments, mask=rows.mask)
            part = {"length": rows.lengths, "truncated": rows.truncated}
            part |= {"logp": rows.logp.sum(axis=1), "start_logp": start_logp.sum(axis=1)}
            part = common.to_host(part)
            endings = text.decode(start.tokenizer, rows.tokens, rows.mask, eos_ids=start.eos_ids)
            columns = {"truncated": part["truncated"].tolist()}
            repeated = [prompt for prompt in asked for _ in range(group)]
            part["reward"] = rewards.evaluate(happy_ending, repeated, endings, columns)
            part["text"] = np.array(endings, object)
            parts.append({name: x.reshape(-1, group) for name, x in part.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return draw


def pick_pairs(prompts: Sequence[str], endings: dict[str, np.ndarray]) -> list[dict]:
    """Of each prompt's endings the best and the worst by the rule. Prompts whose endings all tie give no pair."""
    pairs = []
    for row, prompt in enumerate(prompts):
        best, worst = endings["reward"][row].argmax(), endings["reward"][row].argmin()
        if endings["reward"][row, best] > endings["reward"][row, worst] and all(endings["text"][row, [best, worst]]):
            sides = {"chosen": best, "rejected": worst}
            pair = {side: endings["text"][row, i] for side, i in sides.items()}
            cut_off = {f"{side}_truncated": bool(endings["truncated"][row, i]) for side, i in sides.items()}
            pairs.append({"prompt": prompt} | pair | cut_off)
    print(f"{len(prompts)} beginnings, {len(pairs)} pairs, {len(prompts) - len(pairs)} dropped: no ending was better")
    return pairs


def measure(method: str, setting: str, endings: dict[str, np.ndarray]) -> dict[str, float | str]:
    """One row of the table. The standard error is over prompts; KL is in nats per ending, NLL in nats per token."""
    means = endings["reward"].mean(axis=1)
    words = [body.split() for body in endings["text"].flat]
    grams = [tuple(body[i : i + 3]) for body in words for i in range(len(body) - 2)]
    return {
        "method": method,
        "setting": setting,
        "reward": float(means.mean()),
        "error": float(means.std(ddof=1) / len(means) ** 0.5),
        "kl": float((endings["logp"] - endings["start_logp"]).mean()),
        "start_nll": float(-endings["start_logp"].sum() / endings["length"].sum()),
        "distinct_3": len(set(grams)) / max(1, len(grams)),
        "length": float(endings["length"].mean()),
        "finished": float(1.0 - endings["truncated"].mean()),
    }


def draw_picture(path: pathlib.Path, points: Sequence[dict]) -> None:
    """Held-out reward over KL to the start, a line for each method, and the same over the start's NLL."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x in zip(panels, ("kl", "start_nll")):
        for method, marker in (("start", "s"), ("DPO", "o"), ("GRPO", "^")):
            chosen = sorted((point for point in points if point["method"] == method), key=lambda point: point[x])
            xs, ys, errors = ([point[name] for point in chosen] for name in (x, "reward", "error"))
            axes.errorbar(xs, ys, errors, marker=marker, linewidth=1, capsize=2, label=method)
            for point in chosen:
                at = (point[x], point["reward"])
                axes.annotate(point["setting"], at, (5, -10), textcoords="offset points", fontsize=7)
        axes.set_xlabel({"kl": "KL to the start (nats per ending)", "start_nll": "NLL under the start (per token)"}[x])
    panels[0].set_ylabel("reward on held-out beginnings")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def align(config: Config, pairs: str, beginnings: str) -> Iterator[tuple[str, str, pathlib.Path]]:
    """Runs DPO at each beta and GRPO at each KL weight; yields method, setting and the folder of each run once done."""
    shared = {"model": str(config.output / "start"), "seed": config.seed, "learning_rate": config.learning_rate}
    shared_dpo = shared | {"data": pairs, "steps": config.dpo_steps, "evaluate_every": config.dpo_steps}
    # the ids of a sampled text can be more than were sampled: rows are cut rather than dropped
    shared_dpo |= {"limit": config.beginning_tokens + config.max_new_tokens, "truncate": "keep_start"}
    for beta in config.betas:
        output = config.output / f"dpo_{beta}"
        preference.main(preference.Config(**shared_dpo, output=output, beta=beta, batch_size=2 * config.batch_size))
        yield "DPO", f"beta {beta}", output
    shared_grpo = shared | {"data": beginnings, "steps": config.grpo_steps, "evaluate_every": config.grpo_steps}
    shared_grpo |= {"max_prompt_tokens": config.beginning_tokens, "max_new_tokens": config.max_new_tokens}
    for weight in config.kl_weights:
        output = config.output / f"grpo_{weight}"
        settings = {
            "kl_weight": weight,
            "prompts": config.batch_size,
            "group": config.group,
            "reward": f"{__file__}:happy_ending",
        }
        grpo.main(grpo.Config(**shared_grpo, **settings, output=output))
        yield "GRPO", f"kl {weight}", output


def main(config: Config) -> list[dict]:
    """Runs the study and returns the rows of its table."""
    begun, folder = time.time(), config.output
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output folder {folder} exists and is not empty; name a new one, or remove it")
    start = make_start(config, folder / "start")
    found = make_beginnings(config, start)
    asked, prompts = found[: config.held_out], found[config.held_out :]
    write_lines(folder / "held_out.jsonl", [{"prompt": prompt} for prompt in asked])
    beginnings = write_lines(folder / "beginnings.jsonl", [{"prompt": prompt} for prompt in prompts])
    endings = make_draw(config, start, config.group)(start.params, prompts, jax.random.key(config.seed + 2))
    pairs = write_lines(folder / "pairs.jsonl", pick_pairs(prompts, endings))

    draw = make_draw(config, start, config.samples)
    key = jax.random.key(config.seed + 3)  # the same for every model, so that they differ by the policy alone
    drawn = {"start": draw(start.params, asked, key)}
    points = [measure("start", "", drawn["start"])]
    for method, setting, run in align(config, pairs, beginnings):
        drawn[f"{method} {setting}"] = draw(hf.load(run / "model").params, asked, key)
        points.append(measure(method, setting, drawn[f"{method} {setting}"]))
        (folder / "results.json").write_text(json.dumps(points, indent=2) + "\n")

    draw_picture(folder / "stories.png", points)
    with (folder / "samples.txt").open("w") as file:
        for row, prompt in enumerate(asked[:8]):
            file.write(f"== {prompt}\n")
            for name, endings in drawn.items():
                file.write(f"-- {name}: {endings['reward'][row, 0]:.2f}\n{endings['text'][row, 0]}\n")
    print(f"{common.table(points)}\n{(time.time() - begun) / 60:.0f} minutes; {folder}")
    return points


if __name__ == "__main__":
    main(tyro.cli(Config))
