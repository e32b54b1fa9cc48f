"""What is written comes back to the last bit; an update from it is the online one; nothing half or wrong is left."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet
import pytest
from problems import tiny

from alignax import advantages, corrections, data, sampling, train
from alignax.algorithms import grpo

WIDTH = 12
KINDS = ["rollouts.parquet", "rollouts.jsonl"]


@functools.cache
def sampled():
    """Three prompts of unequal length, two completions each, some of which end on EOS."""
    model, params = tiny()
    prompts = jnp.array([[1, 7, 2, 9], [4, 0, 0, 0], [0, 3, 0, 0]])  # 0 is a token like any other
    generate = functools.partial(sampling.generate, model, max_new_tokens=8, group=2, eos_ids=tuple(range(10, 16)))
    return jax.jit(generate)(params, prompts, jnp.array([4, 1, 2]), jax.random.key(0), top_k=20)


def written(path, **change):
    extra = {
        "rewards": np.array([0.1, -2.0, 1 / 3, 1e-30, 3e38, 0.0], np.float32),
        "parts": {"rule": np.arange(6) / 7, "model": jnp.arange(6.0)},
        "prompts": ["a", "a", "β \n", "β \n", "", ""],
        "completions": [f"\u2028text {i}" for i in range(6)],
        "row_ids": np.arange(40, 46),
        "columns": {"step": [3] * 6, "answer": ["x", None, "y", "z", "u", "v"], "weight": np.float32([1, 0.1] * 3)},
    }
    data.rollouts.write(path, sampled(), **extra | change)
    return extra | change


def assert_bits(found, expected):
    expected = np.asarray(expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_to_the_last_bit(tmp_path, kind):
    given = written(tmp_path / kind)
    samples, found = sampled(), data.rollouts.read(tmp_path / kind, width=WIDTH)
    assert 0 < samples.truncated.sum() < 6 and samples.tokens.shape == (6, WIDTH)
    assert not np.array_equal(samples.logp, samples.processed_logp)
    for name in samples._fields:
        assert_bits(getattr(found, name), getattr(samples, name))
    assert_bits(found.rewards, given["rewards"])
    assert found.parts.keys() == {"rule", "model"}
    assert_bits(found.parts["rule"], (np.arange(6) / 7).astype(np.float32))
    assert found.prompts == given["prompts"] and found.completions == given["completions"]
    assert found.row_ids.tolist() == list(range(40, 46))
    assert found.columns["step"] == [3] * 6 and found.columns["answer"] == given["columns"]["answer"]
    np.testing.assert_array_equal(np.float32(found.columns["weight"]), given["columns"]["weight"])
    assert [x.name for x in tmp_path.iterdir()] == [kind]


def test_random_bits_of_float32_survive(tmp_path):
    """Of every exponent, subnormal numbers too; numpy's own view of the bits."""
    bits = np.random.default_rng(0).integers(0, 2**32, (6, WIDTH), dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(-0.0))
    mask = np.asarray(sampled().mask)
    samples = sampled()._replace(logp=values, processed_logp=None)
    for kind in KINDS:
        data.rollouts.write(tmp_path / kind, samples, rewards=values[:, 0])
        found = data.rollouts.read(tmp_path / kind, width=WIDTH)
        assert_bits(found.logp[mask], values[mask])
        assert_bits(found.rewards, values[:, 0])
        assert found.processed_logp is None and found.prompts is None and found.columns == found.parts == {}
        assert found.row_ids.tolist() == list(range(6))


def test_a_line_is_a_sample(tmp_path):
    """Read by other programs: json and pyarrow."""
    for kind in KINDS:
        written(tmp_path / kind)
    lines = [json.loads(line) for line in (tmp_path / KINDS[1]).read_bytes().splitlines()]
    table = pyarrow.parquet.read_table(tmp_path / KINDS[0])
    assert len(lines) == table.num_rows == 6
    assert (
        str(table.schema.field("logp").type) == "list<element: float>" and table.schema.field("reward").type == "float"
    )
    for line in (lines[3], table.to_pylist()[3]):
        size = int(sampled().lengths[3])
        assert line["prompt"] == "β \n" and line["prompt_ids"] == [4] and line["completion"] == "\u2028text 3"
        assert line["completion_ids"] == sampled().tokens[3, 1 : 1 + size].tolist()
        assert len(line["logp"]) == len(line["processed_logp"]) == size
        assert line["reward/model"] == 3.0 and line["row_id"] == 43 and line["answer"] == "z" and line["step"] == 3
        assert line["truncated"] == bool(sampled().truncated[3])


def test_padding_is_that_of_the_width(tmp_path):
    written(tmp_path / KINDS[0])
    longest = int(sampled().segments.sum(axis=1).max())
    narrow, wide = (data.rollouts.read(tmp_path / KINDS[0], width=width) for width in (None, 20))
    assert narrow.tokens.shape == (6, longest) and wide.tokens.shape == (6, 20)
    for name in ("tokens", "segments", "mask", "logp", "processed_logp"):
        np.testing.assert_array_equal(getattr(narrow, name), getattr(wide, name)[:, :longest])
        assert not np.any(getattr(wide, name)[:, longest:])
    with pytest.raises(ValueError, match=rf"rollouts.parquet\[\d\]: {longest} tokens; expected at most the width 5"):
        data.rollouts.read(tmp_path / KINDS[0], width=5)


def test_a_folder_is_its_files_in_order(tmp_path):
    for step in (2, 1):
        written(tmp_path / "deep" / f"step-{step:06d}.parquet", columns={"step": [step] * 6})
    found = data.rollouts.read(tmp_path / "deep", width=WIDTH)
    assert found.columns == {"step": [1] * 6 + [2] * 6}
    np.testing.assert_array_equal(found.tokens, np.tile(sampled().tokens, (2, 1)))


def test_an_offline_update_is_the_online_one(tmp_path):
    model, params = tiny()
    options = {"kl": None, "correction": corrections.truncated_is_token}
    update = jax.jit(train.make_update(grpo.make_loss(model, **options), optax.sgd(0.5)))

    def learn(rows, rewards):
        found = advantages.group_relative(jnp.asarray(rewards).reshape(3, 2)).ravel()
        arrays = map(jnp.asarray, (rows.tokens, rows.segments, rows.mask))
        batch = grpo.Batch(*arrays, found, rollout_logp=jnp.asarray(rows.logp))
        return update(train.TrainState.create(params, optax.sgd(0.5)), batch, None, {})

    # a sampler that is off: the correction, and with it every bit of logp, counts
    samples = sampled()._replace(logp=sampled().logp - 0.3 * jnp.arange(6.0)[:, None])
    rewards = np.array([0.1, 2.0, 0.3, -1.0, 0.0, 0.7], np.float32)
    online, metrics = learn(samples, rewards)
    for kind in KINDS:
        data.rollouts.write(tmp_path / kind, samples, rewards=rewards)
        rows = data.rollouts.read(tmp_path / kind, width=WIDTH)
        offline, again = learn(rows, rows.rewards)
        jax.tree.map(np.testing.assert_array_equal, (offline.params, again), (online.params, metrics))
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), online.params, params)
    assert max(jax.tree.leaves(moved)) > 1e-3


LOGP = np.zeros((6, WIDTH), np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rewards": [0, 1, np.nan, 0, 0, 0]}, r"rollouts: reward\[2\] is nan; expected finite numbers"),
        ({"rewards": [0, np.inf, 0, 0, 0, 0]}, r"rollouts: reward\[1\] is inf"),
        ({"rewards": [0, 1]}, "rollouts: reward has 2 values for 6 samples"),
        ({"rewards": np.ones((6, 1))}, r"rollouts: reward of shape \(6, 1\); expected a number for each sample"),
        ({"parts": {"rule": [np.nan] * 6}}, r"rollouts: reward/rule\[0\] is nan"),
        ({"prompts": ["a"]}, "rollouts: prompt has 1 values for 6 samples"),
        ({"completions": ["a"] * 7}, "rollouts: completion has 7 values for 6 samples"),
        ({"row_ids": [1]}, "rollouts: row_id has 1 values for 6 samples"),
        ({"row_ids": [0.0] * 6}, r"rollouts: row_ids of shape \(6,\) and dtype float64; expected R integers"),
        ({"row_ids": np.ones((6, 1), int)}, r"rollouts: row_ids of shape \(6, 1\) and dtype int64"),
        ({"row_ids": [0, 1, 2**31, 3, 4, 5]}, r"rollouts: row_ids\[2\] is 2147483648; expected an int32"),
        ({"rewards": [1e300] * 6}, r"rollouts: reward\[0\] is inf; expected finite numbers"),
        ({"prompts": [{1, 2}] * 6}, "rollouts: column 'prompt' holds what JSON does not: .*set"),
        ({"completions": ["\ud800"] * 6}, "rollouts: column 'completion' holds what JSON does not: .*surrogates"),
        ({"columns": {"step": [1]}}, "rollouts: step has 1 values for 6 samples"),
        ({"columns": {"logp": [1] * 6}}, "rollouts: a column is named 'logp', which is taken"),
        ({"columns": {"reward/x": [1] * 6}}, "rollouts: a column is named 'reward/x', which is taken"),
        ({"columns": {"x": [{1, 2}] * 6}}, "rollouts: column 'x' holds what JSON does not: .*set"),
        ({"columns": {"x": [np.nan] * 6}}, "rollouts: column 'x' holds what JSON does not: Out of range"),
    ],
)
def test_refuses_to_write(tmp_path, change, message):
    for kind in KINDS:
        with pytest.raises(ValueError, match=message):
            written(tmp_path / kind, **change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logp": LOGP + np.inf}, r"rollouts: logp\[0, 4\] is inf"),
        ({"logp": LOGP[:, :1]}, r"rollouts: logp of shape \(6, 1\); expected \(6, 12\), as the mask has"),
        ({"tokens": LOGP.astype(int) - 3}, r"rollouts: tokens\[0, 0\] is -3; expected ids of at least 0"),
        ({"mask": LOGP > 0}, r"rollouts: row 0 is not \[prompt\]\[completion\]\[padding\]"),
        ({"mask": LOGP == 0}, r"rollouts: row 0 is not \[prompt\]"),
        ({"segments": (LOGP + 2).astype(int)}, r"rollouts: row 0 is not \[prompt\]"),
    ],
)
def test_refuses_rows_that_are_no_samples(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        data.rollouts.write(tmp_path / KINDS[0], sampled()._replace(**change), rewards=np.zeros(6))
    assert not list(tmp_path.iterdir())


def test_leaves_no_half_file_and_overwrites_none(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"rollouts\.csv: unknown kind of file; expected one of \.parquet, \.jsonl"):
        written(tmp_path / "rollouts.csv")
    mixed = {"x": [1, "a", 2, 3, 4, 5]}
    with pytest.raises(ValueError, match="rollouts: column 'x' is not of one type, which Parquet needs"):
        written(tmp_path / KINDS[0], columns=mixed)
    for columns in ({"x": [{}] * 6}, {"x": [2**70] * 6}):
        with pytest.raises(ValueError, match=r"rollouts: .*Parquet .*'x'|rollouts: column 'x' .* Parquet"):
            written(tmp_path / KINDS[0], columns=columns)
    written(tmp_path / KINDS[1], columns=mixed)
    before = (tmp_path / KINDS[1]).read_bytes()
    with pytest.raises(ValueError, match=r"rollouts\.jsonl: exists; name a new file"):
        written(tmp_path / KINDS[1])

    def dies(path, lines):
        path.write_text('{"half": ')
        assert [x.name for x in tmp_path.iterdir() if not x.name.startswith(".")] == [KINDS[1]]
        raise KeyboardInterrupt

    monkeypatch.setitem(data.rollouts._WRITERS, ".parquet", dies)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / KINDS[0])
    assert [x.name for x in tmp_path.iterdir()] == [KINDS[1]] and (tmp_path / KINDS[1]).read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logp": ...}, r"jsonl:2: no \['logp'\] among its columns \['answer', .*; expected what rollouts.write wrote"),
        ({"answer": ...}, r"jsonl:2: columns .*; expected those of .*jsonl:1, \['answer', "),
        ({"reward": None}, "jsonl:2: reward=None; expected a finite number"),
        ({"reward/rule": "much"}, "jsonl:2: reward/rule='much'; expected a finite number"),
        ({"logp": [0.5]}, r"jsonl:2: lengths \{'prompt_ids': 4, .*'logp': 1"),
        ({"logp": [None]}, r"jsonl:2: logp=\[None\]; expected a list of finite numbers"),
        ({"completion_ids": [0.5]}, r"jsonl:2: completion_ids=\[0\.5\]; expected a list of ids"),
        ({"prompt_ids": []}, r"jsonl:2: lengths \{'prompt_ids': 0, .*; expected a prompt"),
        ({"prompt_ids": [0, 1, 2, 2**31]}, r"jsonl:2: prompt_ids=\[0, 1, 2, 2147483648\]; expected a list of ids"),
        ({"prompt_ids": [0, -1]}, r"jsonl:2: prompt_ids=\[0, -1\]; expected a list of ids"),
        ({"prompt_ids": [[0], [1, 2]]}, r"jsonl:2: prompt_ids=\[\[0\], \[1, 2\]\]; expected a list of ids"),
        ({"completion_ids": [4], "logp": [-1e39]}, r"jsonl:2: logp=\[-1e\+39\]; expected a list of finite numbers"),
        ({"reward": 1e39}, r"jsonl:2: reward=1e\+39; expected a finite number"),
        ({"reward": 10**400}, r"jsonl:2: reward=10+; expected a finite number"),
        ({"row_id": True}, "jsonl:2: row_id=True; expected int32"),
        ({"row_id": 2**31}, "jsonl:2: row_id=2147483648; expected int32"),
        ({"truncated": 1}, "jsonl:2: truncated=1; expected bool"),
        ({"row_id": "1"}, "jsonl:2: row_id='1'; expected int"),
    ],
)
def test_refuses_to_read(tmp_path, change, message):
    path = tmp_path / KINDS[1]
    written(path)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    lines[1] = {name: value for name, value in (lines[1] | change).items() if value is not ...}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        data.rollouts.read(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist"):
        data.rollouts.read(tmp_path / "none.parquet")


def test_a_folder_without_a_row(tmp_path):
    (tmp_path / KINDS[1]).touch()
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: no rows"):
        data.rollouts.read(tmp_path)
