"""Happy endings, the task of stories.py: the rule, beginnings and endings from a model of stories, pairs, measurement.

A `config` here is `stories.Config`.
"""

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import jax
import numpy as np
from matplotlib.figure import Figure

from alignax import models, rewards, sampling
from alignax.data import text
from alignax.io import hf
from alignax.logprobs import last_score, token_logprobs
from alignax.types import Params

HAPPY = "happy smile smiled laugh laughed fun love loved hug hugged joy proud glad".split()
CHUNK = 64  # prompts sampled from at once


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


def make_start(config: Any, folder: pathlib.Path) -> hf.Loaded:
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


def make_beginnings(config: Any, loaded: hf.Loaded) -> list[str]:
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


def make_draw(config: Any, start: hf.Loaded, group: int) -> Callable[..., dict[str, np.ndarray]]:
    """Makes `draw(params, prompts, key, reward=None)`: `group` endings of each prompt, scored by the rule and, if there
    is one, by the reward model; arrays [prompts, group] by name.
    """
    generate = partial(sampling.generate, start.model, max_new_tokens=config.max_new_tokens, eos_ids=start.eos_ids)
    sample, score = jax.jit(partial(generate, group=group)), jax.jit(partial(token_logprobs, start.model))
    judge = jax.jit(partial(last_score, models.with_score(start.model)))

    def draw(params, prompts: Sequence[str], key: jax.Array, reward: Params = None) -> dict[str, np.ndarray]:
        parts = []
        for first in range(0, len(prompts), CHUNK):
            asked = prompts[first : first + CHUNK]
            tokens, lengths = text.encode(start.tokenizer, asked, width=config.beginning_tokens)
            row_ids = np.arange(first * group, (first + len(asked)) * group)
            rows = sample(params, tokens, lengths, key, row_ids=row_ids)
            start_logp = score(start.params, rows.tokens, rows.segments, mask=rows.mask)
            part = {"length": rows.lengths, "truncated": rows.truncated}
            part |= {"logp": rows.logp.sum(axis=1), "start_logp": start_logp.sum(axis=1)}
            if reward is not None:
                part["learned"] = judge(reward, rows.tokens, rows.segments)
            part = common.to_host(part)
            endings = text.decode(start.tokenizer, rows.tokens, rows.mask, eos_ids=start.eos_ids)
            columns = {"truncated": part["truncated"].tolist()}
            repeated = [prompt for prompt in asked for _ in range(group)]
            part["reward"] = rewards.evaluate(happy_ending, repeated, endings, columns)
            part["text"] = np.array(endings, object)
            parts.append({name: x.reshape(-1, group) for name, x in part.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return draw


def pick_pairs(config: Any, prompts: Sequence[str], endings: dict[str, np.ndarray]) -> list[dict]:
    """Pairs of endings of the same beginning that the rule tells apart, at most `pairs` of each, drawn at random."""
    rng, pairs, without = np.random.default_rng(config.seed), [], 0
    for row, prompt in enumerate(prompts):
        better = compared(endings, row)
        without += not len(better)
        for chosen, rejected in rng.permutation(better)[: config.pairs]:
            sides = {"chosen": chosen, "rejected": rejected}
            pair = {side: endings["text"][row, i] for side, i in sides.items()}
            cut_off = {f"{side}_truncated": bool(endings["truncated"][row, i]) for side, i in sides.items()}
            pairs.append({"prompt": prompt} | pair | cut_off)
    print(f"{len(prompts)} beginnings, {len(pairs)} pairs; {without} beginnings dropped: no ending was better")
    return pairs


def compared(endings: dict[str, np.ndarray], row: int) -> np.ndarray:
    """All (better, worse) among the endings of one beginning, [N, 2]; none of them empty."""
    reward, body = endings["reward"][row], endings["text"][row].astype(bool)
    return np.argwhere((reward[:, None] > reward[None, :]) & body[:, None] & body[None, :])


def pair_accuracy(endings: dict[str, np.ndarray]) -> dict[str, float]:
    """How often the reward model prefers what the rule prefers, with the standard error over beginnings."""
    per_prompt, count = [], 0
    for row, learned in enumerate(endings["learned"]):
        better = compared(endings, row)
        count += len(better)
        if len(better):
            per_prompt.append((learned[better[:, 0]] > learned[better[:, 1]]).mean())
    return {
        "accuracy": float(np.mean(per_prompt)),
        "error": float(np.std(per_prompt, ddof=1) / len(per_prompt) ** 0.5),
        "pairs": count,
        "beginnings": len(per_prompt),
    }


def measure(trial: Any, endings: dict[str, np.ndarray]) -> dict[str, float | str]:
    """One line of the results. The standard error is over prompts; KL is in nats per ending, NLL in nats per token."""
    means = endings["reward"].mean(axis=1)
    words = [body.split() for body in endings["text"].flat]
    grams = [tuple(body[i : i + 3]) for body in words for i in range(len(body) - 2)]
    return {
        "method": trial.method,
        "setting": trial.setting,
        "seed": trial.seed,
        "reward": float(means.mean()),
        "error": float(means.std(ddof=1) / len(means) ** 0.5),
        "learned": float(endings["learned"].mean()),
        "kl": float((endings["logp"] - endings["start_logp"]).mean()),
        "start_nll": float(-endings["start_logp"].sum() / endings["length"].sum()),
        "distinct_3": len(set(grams)) / max(1, len(grams)),
        "length": float(endings["length"].mean()),
        "finished": float(1.0 - endings["truncated"].mean()),
    }


def over_seeds(points: Sequence[dict]) -> list[dict]:
    """The mean of each method and setting over its seeds, and the reward's standard deviation over them (`spread`)."""
    groups: dict[tuple, list[dict]] = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"]), []).append(point)
    table = []
    for (method, setting), found in groups.items():
        rewards = [point["reward"] for point in found]
        row = {"method": method, "setting": setting, "seeds": len(found), "reward": float(np.mean(rewards))}
        row["spread"] = float(np.std(rewards, ddof=1)) if len(found) > 1 else float("nan")
        names = ("learned", "kl", "start_nll", "distinct_3", "length", "finished")
        table.append(row | {name: float(np.mean([point[name] for point in found])) for name in names})
    return table


def draw_picture(path: pathlib.Path, points: Sequence[dict]) -> None:
    """Held-out reward over KL to the start and over the start's NLL: points for runs, lines through their means."""
    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, x in zip(panels, ("kl", "start_nll")):
        for (method, marker), colour in zip((("start", "s"), ("DPO", "o"), ("GRPO", "^"), ("PPO", "D")), "kbgr"):
            chosen = [point for point in points if point["method"] == method]
            if not chosen:
                continue
            axes.scatter(
                [p[x] for p in chosen], [p["reward"] for p in chosen], s=14, color=colour, marker=marker, alpha=0.5
            )
            means = sorted(over_seeds(chosen), key=lambda row: row[x])
            axes.plot(
                [row[x] for row in means], [row["reward"] for row in means], color=colour, linewidth=1, label=method
            )
            for row in means:
                at = (row[x], row["reward"])
                axes.annotate(row["setting"], at, (5, -10), textcoords="offset points", fontsize=7)
        axes.set_xlabel({"kl": "KL to the start (nats per ending)", "start_nll": "NLL under the start (per token)"}[x])
    panels[0].set_ylabel("reward on held-out beginnings")
    panels[0].legend()
    figure.savefig(path, dpi=110)
