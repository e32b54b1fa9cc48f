"""Each bound crossed and not, its patience, what the message says and which rows it names, by hand and by numpy."""

import dataclasses
import functools
import json
import math
import pathlib
import types
import warnings

import common
import jax.numpy as jnp
import numpy as np
import pytest
import running
import signs
import suspects
import tyro
import watch

from alignax import data
from alignax.io import hf

# One field of Options: its metric, a value beyond the default bound and one within it.
PLAIN = {
    "watch_kl": ("kl", 100.0, 99.0),
    "watch_step_kl": ("approx_kl", 0.2, 0.05),
    "watch_ratio": ("ratio/max", 150.0, 20.0),
    "watch_equal_groups": ("frac_reward_zero_std", 1.0, 0.8),
    "watch_parity": ("parity/mean", 0.06, 0.01),
    "watch_truncated": ("truncated", 0.95, 0.5),
    "watch_short": ("length", 1.0, 30.0),
}


DEFAULT = watch.Options()


def logged(**metrics):
    """A history and the last step's values, of metrics given as lists, one for each of the steps 1, 2, ..."""
    history = {name: list(enumerate(values, start=1)) for name, values in metrics.items()}
    step = max(len(values) for values in metrics.values())
    return history, step, {name: values[-1] for name, values in metrics.items() if len(values) == step}


def found(options=DEFAULT, **metrics):
    return watch.check(options, *logged(**metrics))


def only(field, at=0.0, **bound):
    """Options with a single bound."""
    off = {f.name: watch.Bound(0) for f in dataclasses.fields(watch.Options) if f.name != "watch_window"}
    return watch.Options(**(off | {field: watch.Bound(at, **bound)}), watch_window=4)


@pytest.mark.parametrize("field", PLAIN)
def test_a_bound_is_crossed_or_not(field):
    name, beyond, within = PLAIN[field]
    bound = getattr(DEFAULT, field)
    (finding,) = found(**{name: [beyond] * bound.patience})
    assert finding.field == field and not finding.stop
    assert f"step {bound.patience}: " in finding.text and f"{name} is {beyond:.4g}" in finding.text
    assert f"{field}.at, is {bound.at:g}" in finding.text and "Usual reasons: " in finding.text
    assert not found(**{name: [within] * bound.patience})
    assert not found(**{name: [within] + [beyond] * (bound.patience - 1)})
    assert not found(**{name: [beyond] * bound.patience + [within]})
    assert not found(dataclasses.replace(DEFAULT, **{field: watch.Bound(None)}), **{name: [beyond] * 20})


def test_a_metric_counts_behind_a_prefix_but_not_as_a_term_of_the_loss():
    options = only("watch_kl", 5.0)
    assert found(options, **{"held_out/kl": [6.0]}) and found(options, **{"objective/kl": [6.0]})
    assert not found(options, **{"loss/kl": [6.0]}) and not found(options, approx_kl=[6.0])


def test_patience_counts_in_a_row_and_a_warning_returns_when_the_count_has_doubled():
    options = only("watch_kl", 5.0, patience=3)
    spoke = [n for n in range(1, 30) if found(options, kl=[1.0, 9.0, 1.0] + [9.0] * n)]
    assert spoke == [3, 6, 12, 24]
    assert "the last 12 times it was logged" in found(options, kl=[1.0] + [9.0] * 12)[0].text
    assert not found(options, kl=[9.0, 9.0, 1.0, 9.0, 9.0])
    once = only("watch_kl", 5.0)
    assert [n for n in range(1, 600) if found(once, kl=[9.0] * n)] == [2**k for k in range(10)]  # for ever


class Read(list):
    """Points that count how many of them were looked at."""

    total = 0

    def __getitem__(self, index):
        part = super().__getitem__(index)
        Read.total += len(part) if isinstance(index, slice) else 1
        return part

    def walk(self, order):
        for index in order(range(len(self))):
            yield self[index]

    def __iter__(self):
        return self.walk(iter)

    def __reversed__(self):
        return self.walk(reversed)


def test_a_step_reads_no_more_than_windows_and_counts_as_the_whole_history_does():
    rng = np.random.default_rng(3)
    bounds = {"watch_kl": 0.3, "watch_entropy": 0.95, "watch_length": 0.4}
    options = dataclasses.replace(only("watch_kl"), **{name: watch.Bound(at) for name, at in bounds.items()})
    names = ("kl", "entropy", "reward", "length", "length/reward_slope")
    history, counts, spoke = {name: Read() for name in names}, {}, set()
    for step in range(1, 301):
        values = {"kl": rng.uniform(), "entropy": rng.uniform(0.5, 1.5), "reward": step + rng.normal()}
        if step % 3:
            values |= {"length": 20 + step + rng.normal(), "length/reward_slope": rng.uniform(0.0, 0.8)}
        for name, value in values.items():
            history[name].append((step, value))
        Read.total = 0
        new = watch.check(options, history, step, values, counts)
        # kl is searched; entropy is, too, and has its start; three have their start and a window, at two steps of three
        assert Read.total < 2 * 10 + 4 + 3 * 2 * (4 + 2) + 10
        assert new == watch.check(options, history, step, values)
        spoke |= {finding.field for finding in new}
    assert spoke == bounds.keys()


def test_a_stop_comes_at_every_step_once_the_patience_is_over():
    options = only("watch_kl", 5.0, patience=3, then="stop")
    assert [bool(found(options, kl=[9.0] * n)) for n in range(1, 7)] == [False, False, True, True, True, True]
    with pytest.raises(watch.Stop, match=r"kl is 9 nats a completion.*watch_kl.at, is 5"):
        watch.act(options, *logged(kl=[9.0] * 4))


def test_a_metric_that_was_not_a_number_this_time_does_not_count_again():
    options = only("watch_kl", 5.0)
    assert not watch.check(options, {"kl": [(1, 9.0)]}, 2, {"kl": 7.0})


def test_entropy_is_measured_by_its_start():
    options = only("watch_entropy", 0.1, patience=2)
    start = [2.0, 1.6, 2.4, 2.0]  # the window: 2 on average
    assert not found(options, entropy=start) and not found(options, entropy=start + [0.19, 0.21])
    (finding,) = found(options, entropy=start + [0.19, 0.18])
    assert "entropy has fallen to 0.09 of what it was at the start" in finding.text


def rollouts(steps, reward, length, slope):
    """Metrics of a run by functions of the step."""
    columns = {"reward": reward, "length": length, "length/reward_slope": slope}
    return {name: [f(step) for step in range(steps)] for name, f in columns.items()}


def test_length_share_is_the_loop():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(3, 30))
    run = rollouts(
        30, lambda s: 0.1 * s + noise[0, s], lambda s: 20 + s + noise[1, s], lambda s: 0.05 + 0.01 * noise[2, s]
    )
    history, window = {name: list(enumerate(values)) for name, values in run.items()}, 4
    reward, length, slope = (np.array(values) for values in run.values())
    expected = []
    for end in range(2 * window, 31):
        a, b = slice(0, window), slice(end - window, end)
        gain, change = reward[b].mean() - reward[a].mean(), length[b].mean() - length[a].mean()
        error = math.sqrt((reward[a].var() + reward[b].var()) / window)
        real = gain > 2 * error and abs(change) > 0.1 * length[a].mean()
        expected.append((end - 1, slope[b].mean() * change / gain if real else 0.0))
    got = signs.length_share(history, "length/reward_slope", window)
    assert [step for step, _ in got] == [step for step, _ in expected]
    np.testing.assert_allclose([x for _, x in got], [x for _, x in expected], rtol=1e-12)
    assert 0 < sum(x > 0 for _, x in got) < len(got)


@pytest.mark.parametrize(
    "reward, length, slope, crossed",
    [
        (lambda s: 0.1 * s, lambda s: 20.0 + 2 * s, lambda s: 0.05, True),  # all of the gain is length
        (lambda s: 0.1 * s, lambda s: 20.0 - s, lambda s: -0.08, True),  # and where shorter is better
        (lambda s: 0.1 * s, lambda s: 20.0 + 2 * s, lambda s: 0.02, False),  # two fifths
        (lambda s: 0.1 * s, lambda s: 20.0, lambda s: 0.05, False),
        (lambda s: -0.1 * s, lambda s: 20.0 + 2 * s, lambda s: 0.05, False),
    ],
)
def test_reward_by_length_alone_is_told(reward, length, slope, crossed):
    options = only("watch_length", 0.5, patience=3)
    run = rollouts(12, reward, length, slope)
    assert bool(found(options, **{name: values[:10] for name, values in run.items()})) == crossed
    assert not found(options, **{name: values[:9] for name, values in run.items()})


def test_what_a_longer_completion_gets_is_least_squares_within_groups():
    rng = np.random.default_rng(1)
    lengths, rewards = rng.integers(1, 50, size=12), rng.normal(size=12)
    got = signs.length_metrics(lengths, rewards, group=4)
    x = np.concatenate([part - part.mean() for part in np.split(lengths, 3)])
    y = np.concatenate([part - part.mean() for part in np.split(rewards, 3)])
    np.testing.assert_allclose(got["length/reward_slope"], np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    np.testing.assert_allclose(got["length/reward_correlation"], np.corrcoef(x, y)[0, 1])
    alone = signs.length_metrics(lengths, rewards)
    np.testing.assert_allclose(alone["length/reward_slope"], np.polyfit(lengths, rewards, 1)[0])
    assert set(signs.length_metrics(np.full(4, 7), rewards[:4]).values()) == {0.0}


def test_updates_left_out_stop_the_run_by_default_and_say_what_the_last_one_was():
    def at(count):
        return {"policy/skipped/in_a_row": [float(count)], "policy/loss": [0.5]}

    assert not found(**at(9))
    (finding,) = found(**at(10))
    assert finding.stop and "policy/skipped/in_a_row is 10, the limit is 10" in finding.text
    assert "policy/loss 0.5" in finding.text
    warn = only("watch_skips", 3.0)
    assert [count for count in range(13) if found(warn, **at(count))] == [3, 6, 12]
    assert not found(only("watch_skips"), **at(50))


def test_numbers_that_are_none_are_named_at_once():
    (finding,) = watch.check(watch.Options(), {"loss": [(1, 2.0)]}, 2, {"loss": math.nan, "reward": math.inf, "kl": 1})
    assert finding.text == "step 2: not finite: loss = nan, reward = inf" and not finding.stop


ROWS = suspects.Rows(
    names=[f"row {i}" for i in range(5)],
    prompts=["once upon a time " * 9, "b", "c", "d", "e"],
    completions=["A", "B\nb", "C", "D", "E"],
    numbers={"length": np.array([5, 9, 2, 7, 1]), "reward": np.array([0.0, 1.0, 2.0, np.nan, 0.5])},
)


def test_rows_that_stand_out_come_with_prompt_and_completion():
    lines = suspects.worst(ROWS, "length", True).split("\n  ")
    assert [line.split(":")[0] for line in lines] == ["", "row 3", "row 1", "row 0"]  # NaN first
    assert lines[2] == "row 1: length 9, reward 1: 'b' >>> 'B\\nb'"
    assert lines[3].startswith("row 0: length 5, reward 0: 'once upon a time once") and "...'" in lines[3]
    assert len(lines[3]) < 120
    lines = suspects.worst(ROWS, "length", False).split("\n  ")
    assert [line.split(":")[0] for line in lines] == ["", "row 3", "row 4", "row 2"]
    assert suspects.worst(ROWS, "gap").count("\n") == 1  # none has the number: only the one that is not finite


def test_rows_are_asked_for_only_when_there_is_something_to_say():
    asked = []

    def rows():
        asked.append(1)
        return ROWS

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.act(watch.Options(), *logged(kl=[1.0]), rows)
    assert not asked
    with pytest.warns(RuntimeWarning, match=r"truncated is 0.95(.|\n)*row 3: length 7, reward nan: 'd' >>> 'D'"):
        watch.act(only("watch_truncated", 0.9), *logged(truncated=[0.95]), rows)
    assert asked == [1]
    with pytest.warns(RuntimeWarning, match="step 1: not finite"):
        watch.act(None, {}, 1, {"loss": math.nan})


def test_bounds_are_flags():
    flags = ["--watch-kl.at", "50", "--watch-kl.then", "stop", "--watch-entropy.at", "None"]
    options = tyro.cli(watch.Options, args=flags)
    assert options.watch_kl == watch.Bound(50.0, 3, "stop") and options.watch_entropy == watch.Bound(None, 10)


@pytest.mark.parametrize("bad", [{"at": -1.0}, {"at": math.nan}, {"at": 1.0, "patience": 0}])
def test_a_bound_that_means_nothing_is_refused(bad):
    with pytest.raises(ValueError, match=r"a bound .*expected"):
        watch.Bound(**bad)


def test_numbers_of_a_rollout():
    rng = np.random.default_rng(2)
    mask = np.arange(6) >= np.array([[2], [3], [2], [6]])  # the last completion is empty
    drawn, logp = (np.where(mask, rng.normal(size=(4, 6)), np.nan) for _ in range(2))
    samples = types.SimpleNamespace(tokens=np.zeros((4, 6)), mask=mask, logp=drawn, lengths=mask.sum(axis=1))
    verdict = types.SimpleNamespace(reward=np.array([1.0, 3.0, 2.0, 2.0], np.float32), completions=["a", "b", "c", ""])
    scorer = types.SimpleNamespace(logp=lambda params, rows: params * logp)
    rows = suspects.of_rollout({"prompts": ["p", "q"]}, samples, verdict, scorer, 4.0, lambda params: params / 4)
    assert rows.names[2:] == ["row 2, prompt 1", "row 3, prompt 1"] and rows.prompts == ["p", "p", "q", "q"]
    expected = {
        "reward": [1, 3, 2, 2],
        "length": [4, 3, 4, 0],
        "logp": [*(np.mean(drawn[i][mask[i]]) for i in range(3)), 0],
        "spread": [1, 1, 0, 0],
        "gap": [*(np.max(np.abs(logp - drawn)[i][mask[i]]) for i in range(3)), 0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(rows.numbers[name], values, rtol=1e-6, err_msg=name)


def test_rows_of_data_have_their_texts_and_the_log_probabilities_of_now(tiny_folder):
    loaded = hf.load(tiny_folder)
    encode = functools.partial(data.tokenize_example, loaded.tokenizer, limit=12, truncate=data.truncation.keep_start)
    texts = [("ab", "cde"), ("q", "xyz!")]
    rows = [encode(example=data.Example(f"a:{i}", *pair, {})) for i, pair in enumerate(texts)]
    batch = data.batching.supervised([*rows, rows[0]], np.array([1.0, 1, 0]), width=12)  # the last one is a filler
    found = suspects.of_batch(loaded, loaded.params, batch, data.batching.Position(0, 4))
    assert found.names == ["epoch 0, batch 3, row 0", "epoch 0, batch 3, row 1"]
    assert list(found.prompts) == ["ab", "q"] and list(found.completions) == ["cde", "xyz!"]
    logits = loaded.model.logits(
        loaded.params,
        loaded.model.hidden(loaded.params, *map(jnp.asarray, (batch["tokens"], batch["segments"]))).states,
    )
    logp = np.asarray(logits, np.float64) - np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=-1, keepdims=True))
    for i in range(2):
        at = np.flatnonzero(batch["mask"][i])
        expected = np.mean([logp[i, t - 1, batch["tokens"][i, t]] for t in at])
        np.testing.assert_allclose(found.numbers["logp"][i], expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Config(running.Options):
    output: pathlib.Path
    evaluate_every: int = 100


def test_a_stop_saves_and_ends_the_run_with_a_code_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "save_curves", lambda path, curves: None)

    def run(**options):
        run = running.Run(Config(tmp_path / "run", **options), total=5)
        with run:
            state = run.resume({"count": np.int32(0)})
            for step in range(run.step + 1, 6):
                state = {"count": state["count"] + np.int32(1)}
                run.log(step, {"kl": 2.0 * step})
                run.save(step, state)
        return int(state["count"])

    stop = watch.Bound(3.0, patience=2, then="stop")
    with pytest.raises(SystemExit) as ended:
        run(watch_kl=stop)
    assert ended.value.code == running.STOPPED == 77
    said = capsys.readouterr().err
    assert "step 3: kl is 6 nats a completion" in said and "saved at step 3" in said and "change watch_kl" in said
    with pytest.raises(SystemExit):  # what was counted is remembered
        run(watch_kl=stop, resume="auto")
    assert run(watch_kl=watch.Bound(0), resume="auto") == 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]
