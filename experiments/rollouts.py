"""Prompts in, judged samples out: what the scripts that learn from their own samples share.

A `Config` here is any script's that has the fields read below. A reward is a rule, a function `reward(prompts,
completions, **columns) -> list[float]`, or a learned model, which reads the tokens of the row.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import checks
import common
import jax
import jax.numpy as jnp
import numpy as np
import signs

from alignax import data, distributed, models, reduce, rewards, sampling, sharding, train
from alignax.data import text
from alignax.data.tokens import encode_texts
from alignax.io import hf
from alignax.logprobs import last_score, token_logprobs
from alignax.types import Model, Params

REWARDS = {"last_number": rewards.last_number}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How rows are sampled, beside how long and how warm they are, and what is kept of them: fields of a Config.

    The trainer's log-probabilities, and with them every ratio, are those at the temperature, whatever filters are on.
    """

    top_p: float = 1.0
    """Sample only from the most likely tokens that hold this probability."""
    top_k: int = 0
    """Sample only from this many of the most likely tokens; 0 is off."""
    min_p: float = 0.0
    """Sample only tokens at least this many times as likely as the best one; 0 is off."""
    stop: tuple[str, ...] = ()
    """Texts or special tokens that end a completion and stay in it; a line end is $'\\n' in a shell."""
    rollout_bfloat16: bool = False
    """Sample in bfloat16, from weights cast once a rollout; what is trained stays as it is."""
    save_rollouts: bool = False
    """Keep every rollout as OUTPUT/rollouts/step-000001.parquet, one line a sample; see `alignax.data.rollouts`."""


def find_reward(name: str) -> rewards.Reward:
    """A reward by name, or the function FUNCTION of the user's FILE.py."""
    return REWARDS.get(name) or find_function("reward", name, f"one of {sorted(REWARDS)}, or ")


def find_function(flag: str, name: str, others: str = "") -> Callable:
    """The function FUNCTION of the user's FILE.py, as a flag names it; `others` are what it may name besides.

    Raises:
      ValueError: when there is no such file or function.
    """
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        raise ValueError(f"--{flag} {name}: expected {others}FILE.py:FUNCTION with a file there is")
    found = runpy.run_path(path)
    if not callable(found.get(function)):
        raise ValueError(f"--{flag} {name}: {path} has no function {function!r}")
    return found[function]


def check_options(config: Any) -> None:
    """Refuses at once what the sampler would refuse when all is loaded.

    Raises:
      ValueError: for a filter that keeps no token or has no such number, or an empty text in `stop`.
    """
    least, most = dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), 0), {"top_p": 1, "min_p": 1}
    checks.check_ranges(config, least=least, most=most | {"top_k": np.iinfo(np.int32).max})
    if not config.top_p:
        raise ValueError(f"top_p={config.top_p}; expected a number above 0")
    if not all(config.stop):
        raise ValueError(f"stop={config.stop!r}; expected texts, none of them empty")


class Prompts(NamedTuple):
    """Prompts to train on and prompts held out; `batches` makes batches of either, as `data.batches` does."""

    train: list[data.TokenPrompt]
    held_out: list[data.TokenPrompt]
    batches: Callable[..., Iterator]

    def questions(self, shares: int = 1) -> dict[str, Any]:
        """All held-out prompts as one batch, filled up with prompts that weigh 0 to so many equal shares."""
        size = len(self.held_out) + -len(self.held_out) % shares
        return next(self.batches(self.held_out, batch_size=size, seed=None, epochs=1))[0]


def load_prompts(config: Any, policy: hf.Loaded, *others: hf.Loaded) -> Prompts:
    """The prompts of a Config's data; prints how many were left out, and why.

    They are padded to one width, which is part of the sampler's and the updates' compiled shapes.

    Raises:
      ValueError: when prompts with their completions may be longer than the policy or another network was made for.
    """
    source = data.read(config.data)
    found, bad = data.parse(source, data.formats.prompts, columns=config.columns, drop=config.drop_bad_rows)
    cut = common.TRUNCATIONS[config.truncate]
    encode = partial(data.tokenize_prompt, policy.tokenizer, limit=config.max_prompt_tokens, truncate=cut)
    kept, unfit = data.collect(encode, found, drop=config.drop_bad_rows)
    prompts, held_out = common.hold_out(config, kept, data.summary(kept, bad + unfit))
    held_out = held_out[: config.evaluate_prompts]
    width = max(prompt.length for prompt in [*prompts, *held_out])
    for network, of in zip((policy, *others), ("policy", "reward model")):
        checks.check_context(network, "longest prompt + max_new_tokens", width + config.max_new_tokens, of=of)
    return Prompts(prompts, held_out, partial(data.batches, collate=data.batching.prompts, buckets=[width]))


class Part(NamedTuple):
    """One summand of the reward. score: `(prompts, completions, samples, columns) -> [own]`, checked.

    All but the samples are of the rows that this process looks after (`distributed.own_rows`), all where it is alone.
    """

    name: str
    weight: float
    score: Callable[..., np.ndarray]


def rule(name: str, weight: float) -> Part:
    """A rule by name, see `find_reward`."""
    reward = find_reward(name)

    def score(prompts, completions, samples, columns):
        del samples
        return rewards.evaluate(reward, prompts, completions, columns) if prompts else np.zeros(0, np.float32)

    return Part("rule", weight, score)


def learned(folder: str, weight: float, tokenizer: Any, *, size: int, **options: Any) -> tuple[hf.Loaded, Part]:
    """A reward model's folder, and its score of the rows as they were sampled, `size` of them at a time.

    `options` are those of `hf.load`.

    Raises:
      ValueError: for a folder without a scalar head or a tokenizer, or with another vocabulary than `tokenizer`'s.
    """
    loaded = hf.load(folder, **options)
    if loaded.model.values is None:
        raise ValueError(f"{folder}: a language model; expected a reward model, a ...ForSequenceClassification folder")
    if loaded.tokenizer is None:
        raise ValueError(f"{folder}: no tokenizer; expected the policy's, since the reward model reads its tokens")
    try:
        data.same_vocabulary(tokenizer, loaded.tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder}: the reward model reads the policy's tokens, but {error}") from None
    last = jax.jit(train.in_parts(lambda params, rows: last_score(loaded.model, params, *rows), size))

    def score(prompts, completions, samples, columns):
        del columns
        found = common.to_host(last(loaded.params, (samples.tokens, samples.segments)))
        found = found[distributed.own_rows(samples.tokens)].tolist()

        def reward_model(prompts, completions):
            return found

        return rewards.evaluate(reward_model, prompts, completions)

    return loaded, Part("model", weight, score)


class Verdict(NamedTuple):
    """What is said about R samples. reward: the weighted sum; parts: its summands by name, unweighted.

    completions: of the rows that this process looks after, all where it is alone.
    """

    completions: Sequence[str]
    reward: np.ndarray
    parts: dict[str, np.ndarray]


def judge(
    summands: Sequence[Part], loaded: hf.Loaded, asked: dict, samples: sampling.Samples, group: int = 1
) -> Verdict:
    """The texts of samples and their rewards, each with the prompt and the columns of its row.

    Each process decodes and judges the rows that it looks after, and then all know the rewards of all.
    """
    own = [int(row) // group for row in distributed.own_rows(samples.tokens)]
    here = distributed.take_own_rows({name: getattr(samples, name) for name in ("tokens", "mask", "truncated")})
    completions = text.decode(loaded.tokenizer, here["tokens"], here["mask"], eos_ids=loaded.eos_ids)
    names = {name: None for row in asked["columns"] for name in row}
    if "truncated" in names:
        raise ValueError("a column of the prompts is named 'truncated', which rewards are told of samples; rename it")
    columns = {name: [asked["columns"][i].get(name) for i in own] for name in names}
    columns["truncated"] = here["truncated"].tolist()
    prompts = [asked["prompts"][i] for i in own]
    scores = {part.name: part.score(prompts, completions, samples, columns) for part in summands}
    parts = distributed.join_rows(scores, samples.tokens)
    total = sum(part.weight * parts[part.name] for part in summands)
    return Verdict(completions, np.asarray(total, np.float32), parts)


def all_texts(loaded: hf.Loaded, samples: sampling.Samples) -> list[str]:
    """The completions of all rows, on every process: for what is printed or kept."""
    tokens, mask = common.to_host((samples.tokens, samples.mask))
    return text.decode(loaded.tokenizer, tokens, mask, eos_ids=loaded.eos_ids)


def rows_at_once(config: Any) -> int:
    """The rows that go through a model together: those of a micro-batch."""
    return config.prompts * config.group // (config.minibatches * config.microbatches)


def stop_ids(tokenizer: Any, stops: Sequence[str], most: int) -> list[list[int]]:
    """The ids that may spell each text: at the end or before a letter, behind one of several signs, or in one token.

    A tokenizer spells a text differently by what stands around it, so that one spelling would miss most of them. Those
    that begin inside of one token and end in another are still missed. A special token is its own id.

    Raises:
      ValueError: for a text of more than `most` tokens, which would stop nothing.
    """
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = [tokenizer.decode([index]) for index in range(len(tokenizer))] if set(stops) - set(special) else []
    found = [[special[stop]] for stop in stops if stop in special]
    for stop in (stop for stop in stops if stop not in special):
        spelled = [encode_texts(tokenizer, before, stop)[1] for before in ("a", ".", '"', " ", "\n")]
        *inside, letter = encode_texts(tokenizer, "a", stop + "a")[1]
        spelled += [inside] if inside and pieces[letter] == "a" else []
        if min(map(len, spelled)) > most:
            raise ValueError(f"stop {stop!r} has {len(spelled[0])} tokens; expected at most max_new_tokens={most}")
        found += [ids for ids in spelled if len(ids) <= most]
        found += [[index] for index, piece in enumerate(pieces) if stop in piece]
    return [list(ids) for ids in dict.fromkeys(map(tuple, found))]


def make_sample(config: Any, loaded: hf.Loaded, *, group: int = 1, mixed: bool = False) -> Callable:
    """Makes `sample(params, tokens, lengths, key) -> Samples`, a group of completions for each prompt, compiled.

    `mixed`: of `models.mixture`, to which the parameters then belong.
    """
    fields = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")
    settings = {name: getattr(config, name) for name in fields} | {"eos_ids": loaded.eos_ids, "group": group}
    settings["stop"] = stop_ids(loaded.tokenizer, config.stop, config.max_new_tokens)
    model: Model = loaded.model
    if config.rollout_bfloat16:
        model = models.transformer(dataclasses.replace(loaded.model.config, dtype=jnp.bfloat16))
    model = models.mixture(model) if mixed else model

    def cast(params: Params) -> Params:
        if not config.rollout_bfloat16:
            return params
        networks = {name: params[name] for name in ("policy", "reference")} if mixed else params
        networks = sampling.rollout_params(networks)
        return params | networks if mixed else networks

    def sample(params: Params, *asked: jax.Array) -> sampling.Samples:
        samples = sampling.generate(model, sharding.gathered(cast(params), models.RULES), *asked, **settings)
        return jax.tree.map(lambda x: sharding.constrain(x, sharding.ROW_AXES), samples)

    return jax.jit(sample)


class Sampler(NamedTuple):
    """What is compiled around sampling, each once."""

    sample: Callable  # (params, tokens, lengths, key) -> Samples, a group for each prompt
    sample_one: Callable  # the same, one completion for each prompt
    logp: Callable  # (params, samples) -> log-probabilities [R, T] by the trainer's arithmetic


def make_sampler(config: Any, loaded: hf.Loaded) -> Sampler:
    """The sampler of one model, and the scorer of what it samples, on as many rows at once as an update takes."""
    model = loaded.model

    def logp(params: Params, rows: sampling.Samples) -> jax.Array:
        return token_logprobs(model, params, rows.tokens, rows.segments, mask=rows.mask, temperature=config.temperature)

    return Sampler(
        sample=make_sample(config, loaded, group=config.group),
        sample_one=make_sample(config, loaded),
        logp=jax.jit(train.in_parts(logp, rows_at_once(config))),
    )


def passes(key: jax.Array, rollout: Any, *, epochs: int, minibatches: int) -> Iterator[Any]:
    """The minibatches of several passes over a rollout, each pass in an order of its own."""
    for epoch in range(epochs):
        yield from train.minibatches(jax.random.fold_in(key, epoch), rollout, minibatches)


def mean_of(parts: Sequence[dict[str, jax.Array]]) -> dict[str, Any]:
    """The mean of each metric over a rollout's updates, the largest of .../max and .../in_a_row; and their number."""
    over = {name: jnp.max if name.endswith(("/max", "/in_a_row")) else jnp.mean for name in parts[0]}
    return {name: f(jnp.stack([part[name] for part in parts])) for name, f in over.items()} | {"updates": len(parts)}


def rollout_metrics(rows: sampling.Samples, verdict: Verdict, counted: np.ndarray) -> dict[str, Any]:
    """What a rollout was like, over the rows that count."""
    parts = {f"reward/{name}": x for name, x in verdict.parts.items()} if len(verdict.parts) > 1 else {}
    sizes = common.to_host({"length": rows.lengths, "truncated": rows.truncated})
    metrics = {name: x[counted].mean() for name, x in {"reward": verdict.reward, **parts, **sizes}.items()}
    return metrics | {"reward/std": verdict.reward[counted].std()}


def parity_metrics(report: sampling.ParityReport) -> dict[str, jax.Array]:
    """Whether sampler and trainer agree; a correction makes up for what they do not."""
    return {f"parity/{name}": getattr(report, name) for name in ("max", "mean", "k3", "outside")}


def save(
    config: Any,
    loaded: hf.Loaded,
    step: int,
    asked: dict,
    samples: sampling.Samples,
    rewards: np.ndarray,
    parts: Mapping[str, np.ndarray],
    completions: Sequence[str],
    row_ids: np.ndarray | None = None,
    **columns: Sequence,
) -> None:
    """Writes a rollout of R samples where the Config wants it; rows that fill up an epoch's last batch weigh 0.

    All processes call this, and the first one writes. completions: of all rows, or as a Verdict has them.
    """
    samples = common.to_host(samples) if config.save_rollouts else samples
    if not config.save_rollouts or not distributed.is_first():
        return
    if len(completions) < len(rewards):
        completions = all_texts(loaded, samples)
    group = len(rewards) // len(asked["lengths"])
    prompts = [row[:length] for row, length in zip(asked["tokens"], asked["lengths"])]
    texts = loaded.tokenizer.batch_decode(prompts, clean_up_tokenization_spaces=False)  # as the model saw them
    file = config.output / "rollouts" / f"step-{step:06d}.parquet"
    file.unlink(missing_ok=True)  # of a run that was killed before it saved this step
    data.rollouts.write(
        file,
        samples,
        rewards=rewards,
        parts=parts,
        prompts=[prompt for prompt in texts for _ in range(group)],
        completions=completions,
        row_ids=row_ids,
        columns={"step": [step] * len(rewards), "weight": np.repeat(asked["weights"], group), **columns},
    )


def make_record(config: Any, loaded: hf.Loaded, sampler: Sampler) -> Callable[..., dict[str, Any]]:
    """Makes `record(step, params, asked, rows, verdict) -> metrics`, of a rollout by parameters that have not moved.

    It saves the rollout, if asked to; some metrics say, now and then, whether trainer and sampler agree.
    """
    compare = jax.jit(sampling.compare_logp)

    def record(step: int, params: Params, asked: dict, rows: sampling.Samples, verdict: Verdict) -> dict[str, Any]:
        save(config, loaded, step, asked, rows, verdict.reward, verdict.parts, verdict.completions)
        counted = np.repeat(asked["weights"], config.group) > 0
        metrics = rollout_metrics(rows, verdict, counted)
        metrics |= signs.length_metrics(common.to_host(rows.lengths)[counted], verdict.reward[counted], config.group)
        if step == 1 or step % config.evaluate_every == 0:
            metrics |= parity_metrics(compare(sampler.logp(params, rows), rows.logp, rows.mask))
        return metrics

    return record


def make_evaluate(
    config: Any,
    loaded: hf.Loaded,
    sampler: Sampler,
    summands: Sequence[Part],
    asked: dict,
    mesh: jax.sharding.Mesh | None = None,
) -> Callable[[Params], tuple[dict[str, float], Sequence[str]]]:
    """Makes `evaluate(params) -> (metrics, completions)`: one completion of each held-out prompt.

    With a mesh its devices share the prompts, of which there are as many as divide (`Prompts.questions`).

    The metrics are the mean reward and its parts, KL to the model as it was loaded (k1, nats per completion), length
    and the fraction cut off. The key is the same every time, so that evaluations differ by the policy alone.
    """
    key, counted = jax.random.key(config.seed + 1), asked["weights"] > 0
    given = (asked["tokens"], asked["lengths"], counted)
    tokens, lengths, counts = given if mesh is None else sharding.shard_batch(given, mesh)
    moved = jax.jit(lambda new, old, mask, counts: reduce.sequence_sum(new - old, mask & counts[:, None]).value())

    def evaluate(params: Params) -> tuple[dict[str, float], Sequence[str]]:
        rows = sampler.sample_one(params, tokens, lengths, key)
        kl = moved(sampler.logp(params, rows), sampler.logp(loaded.params, rows), rows.mask, counts)
        verdict = judge(summands, loaded, asked, rows)
        values = rollout_metrics(rows, verdict, counted) | {"kl": kl}
        texts = verdict.completions if jax.process_count() == 1 else all_texts(loaded, rows)
        return {f"held_out/{name}": float(value) for name, value in values.items()}, texts

    return evaluate
