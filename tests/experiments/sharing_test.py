"""`--share-prompts` of preference.py: which columns are chosen, and that updates are the same."""

import pathlib
from functools import partial
from types import SimpleNamespace

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import optax
import packed
import pairwise
import preference
import sharing

from alignax import data, sharding, train
from alignax.algorithms import preference as preference_loss
from alignax.io import hf


def pair(prompt, chosen, rejected):
    def side(length, token):
        tokens = np.array([5] * prompt + [token] * length, np.int32)
        return data.TokenRow(tokens, np.arange(prompt + length) >= prompt)

    return pairwise.PairRow(data.TokenPair(side(chosen, 6), side(rejected, 7)), {}, None)


def arranged(pairs, **changes):
    config = SimpleNamespace(**{"share_prompts": True, "pack": 0, "seed": 0, "steps": 9} | changes)
    batches = partial(data.batches, collate=pairwise.collate, batch_size=2, buckets=[16, 32])
    return sharing.arrange(config, pairs, batches), batches


def test_shapes_are_chosen_by_the_tokens_they_save(capsys):
    # width 32: 20 + 2 * 4 columns for 64; width 16: 1 + 2 * 15 for 32 saves no tenth
    pairs = [pair(20, 4, 3)] * 6 + [pair(1, 15, 14)] * 2
    found, batches = arranged(pairs)
    assert found.shapes == {32: sharing.Shape(20, 4)}
    # 3 batches of 28 for 64 and one of 32 as it is: 224 / 116
    assert "runs once for both sides of its pair: 1.9 times fewer tokens" in capsys.readouterr().out
    for batch, _ in batches(pairs, seed=0, epochs=1):
        wide = batch["tokens"].shape[2] == 32
        now, completion = found.arrange(batch)
        assert completion == (4 if wide else 0) and now["tokens"].shape[2] == (24 if wide else 16)
        assert now["segments"].sum() == batch["segments"].sum() and now["mask"].sum() == batch["mask"].sum()
    (other, _), *_ = batches([pair(20, 5, 3)] * 2, seed=0, epochs=1)
    assert found.arrange(other) == (other, 0)  # does not fit
    for reason in ({"share_prompts": False}, {"pack": 64}):
        assert arranged(pairs, **reason)[0] == sharing.Sharing()
    assert arranged([pair(2, 14, 13)] * 4)[0] == sharing.Sharing()
    degraded = [row._replace(degraded=row.pair.chosen) for row in pairs]
    assert arranged(degraded)[0] == sharing.Sharing() and not capsys.readouterr().out


def test_updates_are_the_same(tiny_folder):
    """The loss reads both networks at every token, and the reference in its pass."""
    rows = [pair(9 + i % 3, 3 + i % 2, 4) for i in range(4)]
    found, batches = arranged(rows)
    (batch, _), _ = batches(rows, seed=0, epochs=1)
    options = {"loss": "tdpo2", "batch_size": 2, "limit": 32}
    config = preference.Config(model="", data="", output=pathlib.Path("none"), **options)
    objective, hyper = preference.check_loss(config, sharding.make_mesh(data=1))
    loaded, optimizer = hf.load(tiny_folder), optax.sgd(0.1)
    update, _, _ = preference.make_steps(
        config, objective, loaded.model, optimizer, packed.Packing(), adapters.Adapters()
    )
    frozen, metrics = {"reference": loaded.params}, {}
    for way, (arrays, completion) in {"shared": found.arrange(batch), "plain": (batch, 0)}.items():
        state = train.TrainState.create(jax.tree.map(jnp.copy, loaded.params), optimizer)
        for _ in range(2):
            state, metrics[way] = update(completion)(state, preference_loss.Batch(**arrays), frozen, hyper)
    assert found.arrange(batch)[1] and metrics["plain"]["rewards/margins"] > 1e-3
    assert metrics["shared"].keys() == metrics["plain"].keys()
    for name, value in metrics["plain"].items():
        np.testing.assert_allclose(metrics["shared"][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
