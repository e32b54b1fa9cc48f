"""The slot engine against `generate`; nothing lost, nothing twice, nothing waited for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from references import toys

from alignax import sampling
from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.sampling import engine as module
from alignax.sampling import generate


@functools.cache
def llama():
    config = TransformerConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_positions=16,
        initializer_range=0.4,
    )
    model = transformer(config)
    return model, drawn(model, scale=0.4)


@functools.cache
def long_llama():
    model, params = llama()
    return transformer(dataclasses.replace(model.config, max_positions=96)), params


@functools.cache
def made(model, **options):
    """Compiled once for all tests that use it."""
    return sampling.make_engine(model, **{"slots": 4, "buckets": (3, 5), "max_new_tokens": 9, "block": 3} | options)


@functools.cache
def sampler(model, **options):
    return jax.jit(functools.partial(generate, model, max_new_tokens=9, **options))


def counting():
    """A chain that counts 1 2 3 4 0 1 ...: what follows a prompt is known."""
    return toys.chain(), 50.0 * jnp.roll(jnp.eye(5), 1, axis=1)


def counted(model):
    """A model that notes its traces: the width of a prefill, 1 for a block of decoding."""
    traced = []

    def hidden(params, tokens, *rest, positions=None, **options):
        traced.append("block" if positions is not None else tokens.shape[1])
        return model.hidden(params, tokens, *rest, positions=positions, **options)

    return model._replace(hidden=hidden), traced


def ragged(count, vocabulary, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocabulary, (count, 5)), rng.integers(1, 6, count)


def watched(monkeypatch, engine):
    """An engine that notes its blocks and their reading, in order."""
    seen, to_host = [], module.to_host
    monkeypatch.setattr(module, "to_host", lambda tree: (seen.append("read"), to_host(tree))[1])
    return engine._replace(block=lambda *args: (seen.append("block"), engine.block(*args))[1]), seen


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("build", [lambda: toys.history()[:2], llama])
def test_samples_are_those_of_generate(build, group, key):
    model, params = build()
    prompts, lengths = ragged(4, 7)
    settings = {"eos_ids": (2, 24), "temperature": 0.8, "top_p": 0.95}
    # as many rows in a step as in the engine's four slots
    static = sampler(model, group=group)(params, jnp.asarray(prompts), jnp.asarray(lengths), key, **settings)
    found = sampling.collect(sampling.serve(made(model, group=group), params, prompts, lengths, key, **settings))
    assert len(set(static.lengths.tolist())) > 1
    for name, value in found._asdict().items():
        assert isinstance(value, np.ndarray)
        compare = np.testing.assert_allclose if "logp" in name else np.testing.assert_array_equal
        compare(value, getattr(static, name), **({"rtol": 0, "atol": 2e-6} if "logp" in name else {}))


@pytest.mark.parametrize("group", [1, 2])
def test_a_sample_is_the_same_in_any_slot(group, key):
    model, params = llama()
    prompts, lengths = ragged(23, 32)
    settings = {"eos_ids": (2, 20), "max_tokens": np.random.default_rng(1).integers(1, 10, 23 * group)}
    engine = made(model, group=group)
    first = sampling.collect(sampling.serve(engine, params, prompts, lengths, key, **settings))
    order = np.random.default_rng(0).permutation(23)
    rows = (order[:, None] * group + np.arange(group)).reshape(-1)
    settings["max_tokens"] = settings["max_tokens"][rows]
    moved = sampling.serve(engine, params, prompts[order], lengths[order], key, row_ids=rows, **settings)
    moved = sampling.collect(moved)
    np.testing.assert_array_equal(moved.tokens, first.tokens[rows])
    np.testing.assert_array_equal(moved.truncated, first.truncated[rows])
    np.testing.assert_allclose(moved.logp, first.logp[rows], rtol=0, atol=2e-6)
    assert len(set(first.lengths.tolist())) > 4


def test_room_for_long_rows_only_while_there_are_any(key):
    """Own slots grow and shrink between blocks: neither tokens nor the number of programs depend on what is inside."""
    model, params = long_llama()
    model, traced = counted(model)
    prompts, lengths = ragged(11, 32)
    budgets = np.array([4, 76, 5, 30, 6, 3, 60, 2, 7, 5, 20])
    engine = sampling.make_engine(model, slots=3, buckets=(5,), max_new_tokens=76, block=5, entering=1)
    assert engine.rooms == (19, 38, 57, 76)
    rooms = []
    noted = engine._replace(resize=lambda state, room: (rooms.append(room), engine.resize(state, room))[1])
    found = sampling.collect(sampling.serve(noted, params, prompts, lengths, key, max_tokens=budgets))
    assert {38, 57, 76} <= set(rooms) and rooms != sorted(rooms)
    assert traced.count("block") <= 4 and traced.count(5) == 2  # the second finds the shapes of the slots
    whole = jax.jit(functools.partial(generate, model._replace(rooms=None), max_new_tokens=76))
    whole = whole(params, jnp.asarray(prompts), jnp.asarray(lengths), key, max_tokens=jnp.asarray(budgets))
    np.testing.assert_array_equal(found.tokens, whole.tokens)
    np.testing.assert_allclose(found.logp, whole.logp, rtol=0, atol=1e-5)


def test_a_row_that_went_wrong_spoils_none_that_comes_after_it(key):
    model, params = long_llama()
    params = params | {"embed": {"embedding": params["embed"]["embedding"].at[7].set(jnp.nan)}}
    engine = sampling.make_engine(model, slots=2, buckets=(3,), max_new_tokens=76, block=16, entering=1)
    prompts, budgets = np.array([[1, 7, 2], [1, 2, 3], [4, 5, 6]]), np.array([40, 76, 4])
    ends = {"max_tokens": budgets, "forbidden": (7,)}
    found = sampling.collect(sampling.serve(engine, params, prompts, np.full(3, 3), key, **ends))
    assert np.isnan(found.logp).sum(axis=1).tolist() == [40, 0, 0]


def test_ten_thousand_prompts_through_sixteen_slots(key):
    model, params = counting()
    rng = np.random.default_rng(0)
    prompts, budgets = rng.integers(0, 5, (10_000, 1)), np.minimum(rng.geometric(0.3, 10_000), 9)
    engine = made(model, slots=16, buckets=(1,), entering=8)
    served = list(sampling.serve(engine, params, prompts, np.ones(10_000, int), key, max_tokens=budgets))
    assert sorted(found.place for found in served) == list(range(10_000))
    rows = sampling.collect(iter(served))
    columns = np.arange(10)
    expected = np.where(columns <= budgets[:, None], (prompts + columns) % 5, 0)
    np.testing.assert_array_equal(rows.tokens, expected)
    np.testing.assert_array_equal(rows.lengths, budgets)


def test_one_transfer_for_each_block_and_it_is_read_one_block_late(monkeypatch, key):
    model, params = counting()
    prompts, lengths = ragged(30, 5)
    engine, seen = watched(monkeypatch, made(model))
    served = sampling.serve(engine, params, prompts, lengths, key, eos_ids=(0,))
    # the CPU knows no transfer to the host; this holds what goes to the device to what is meant to go there
    with jax.transfer_guard("disallow"):
        assert len(list(served)) == 30
    assert seen[:4] == ["read", "block", "block", "read"]  # the settings, once; two blocks before the first is read
    assert seen.count("read") == seen.count("block")
    assert all(pair == ("block", "read") for pair in zip(seen[2::2], seen[3::2]))


def test_nothing_compiles_anew(key):
    model, params = llama()
    model, traced = counted(model)
    engine = sampling.make_engine(model, slots=3, buckets=(2, 5), max_new_tokens=4, entering=2)
    prompts, lengths = ragged(9, 32)
    prompts, lengths = np.concatenate([prompts, prompts]), np.concatenate([lengths, np.minimum(lengths, 2)])
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 0.9)):
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "eos_ids": (int(10 * temperature),)}
        list(sampling.serve(engine, params, prompts, lengths, key, **settings))
    # one for each bucket, beside that which finds the shapes of the slots
    assert sorted(traced, key=str) == [2, 5, 5, "block"]


def test_stop_sequences_across_blocks(key):
    model, params = counting()
    prompts = np.array([[0], [1], [2], [3]])
    served = sampling.serve(made(model, block=2), params, prompts, np.ones(4, int), key, stop=((2, 3, 4), (1, 1)))
    rows = sampling.collect(served)
    assert rows.lengths.tolist() == [4, 3, 7, 6]  # from 2 on the prompt's own 2 does not count
    assert not rows.truncated.any()
    assert [row[row_mask].tolist()[-3:] for row, row_mask in zip(rows.tokens, rows.mask)] == [[2, 3, 4]] * 4


def test_one_token_each_and_a_consumer_that_leaves_early(key):
    model, params = counting()
    prompts, lengths = ragged(7, 5)
    rows = sampling.collect(sampling.serve(made(model), params, prompts, lengths, key, max_tokens=1))
    last = prompts[np.arange(7), lengths - 1]
    np.testing.assert_array_equal(rows.tokens[np.arange(7), lengths], (last + 1) % 5)
    assert rows.lengths.tolist() == [1] * 7
    served = sampling.serve(made(model), params, prompts, lengths, key)
    next(served)
    served.close()


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"lengths\[1\]=0.*empty prompt", {"lengths": np.array([1, 0])}),
        (ValueError, r"a prompt of 6 tokens; expected at most 5", {"lengths": np.array([6, 1])}),
        (TypeError, r"prompts of dtype float32; expected integers", {"prompts": np.ones((2, 6))}),
        (ValueError, r"prompts\[1, 0\]=32; expected ids of 0 to 31", {"prompts": np.array([[1, 99], [32, 1]])}),
        (ValueError, r"row_ids of shape \(3,\)", {"row_ids": np.arange(3)}),
        (ValueError, r"top_p=0\.0", {"top_p": 0.0}),
        (ValueError, r"max_tokens=.*; expected at most max_new_tokens=9", {"max_tokens": 10}),
        (TypeError, r"heat", {"heat": 1.0}),
    ],
)
def test_refuses_before_the_first_block(error, message, change, key):
    model, params = llama()
    asked = {"prompts": np.ones((2, 6), int), "lengths": np.array([1, 2])} | change
    with pytest.raises(error, match=message):
        sampling.serve(made(model), params, asked.pop("prompts"), asked.pop("lengths"), key, **asked)


def test_nothing_to_collect_is_no_empty_result():
    with pytest.raises(ValueError, match="nothing to collect"):
        sampling.collect(iter(()))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"slots=0; expected at least 1", {"slots": 0}),
        (ValueError, r"no buckets", {"buckets": ()}),
        (ValueError, r"buckets\[1\]=0", {"buckets": (4, 0)}),
        (ValueError, r"width 8 and max_new_tokens=9 need 17 positions.*16", {"buckets": (8,)}),
    ],
)
def test_refuses_engines(error, message, options):
    with pytest.raises(error, match=message):
        sampling.make_engine(llama()[0], **{"slots": 2, "buckets": (4,), "max_new_tokens": 9} | options)
