"""Cached reference log-probabilities: what is kept, what is found again, and every way of being stale."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems, tiny

from alignax.algorithms import preference
from alignax.data import reference_cache
from alignax.models import flash


@functools.cache
def compute():
    model, _ = tiny()
    return jax.jit(functools.partial(preference.logprobs, model))


def pairs(start=0, stop=None, wider=0):
    """The pairs of the problem "dpo", some of them, with more padding."""
    batch = problems()["dpo"].batch
    cut = {name: getattr(batch, name)[start:stop] for name in ("tokens", "segments", "mask")}
    return {name: np.pad(x, [(0, 0), (0, 0), (0, wider)]) for name, x in cut.items()}


@functools.cache
def rows():
    _, params = tiny()
    return reference_cache.collect(lambda batch: compute()(params, preference.Batch(**batch)), [pairs()])


@pytest.fixture
def key(tokenizer):
    model, params = tiny()
    return reference_cache.key(params, tokenizer, model.config)


def test_rows_are_found_in_any_order_batch_and_width(key, tmp_path):
    model, params = tiny()
    file = tmp_path / "reference.safetensors"
    reference_cache.write(file, key, rows())
    found = reference_cache.read(file, key)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]  # nothing half written is left
    backwards = {name: x[::-1] for name, x in pairs(3, 11, wider=2).items()}
    filled = reference_cache.fill(backwards, found)
    assert filled["ref_logp"].dtype == np.float32 and filled.keys() == {*backwards, "ref_logp"}
    every = np.asarray(compute()(params, preference.Batch(**pairs())))
    expected = np.pad(np.where(pairs()["mask"], every, 0), [(0, 0), (0, 0), (0, 2)])[3:11][::-1]
    np.testing.assert_array_equal(filled["ref_logp"], expected)
    assert np.any(expected) and not backwards["mask"].all(-1).any()
    # A loss reads them as it reads a reference's.
    loss_fn = jax.jit(preference.make_loss(model))
    other = jax.tree.map(lambda x: 1.1 * x, params)
    with_cache, _ = loss_fn(other, preference.Batch(**reference_cache.fill(pairs(), found)), None, {})
    with_reference, _ = loss_fn(other, preference.Batch(**pairs()), {"reference": params}, {})
    np.testing.assert_allclose(with_cache["pairs"].mean.total, with_reference["pairs"].mean.total, rtol=1e-6)


def test_the_cache_is_refused_after_one_weight_changes(key, tokenizer, tmp_path):
    """One number by one unit in the last place."""
    model, params = tiny()
    reference_cache.write(tmp_path / "file", key, rows())
    changed = jax.tree.map(np.array, params)
    kernel = changed["layers"]["attn"]["q"]["kernel"]
    kernel[1, 2, 3] = np.nextafter(kernel[1, 2, 3], np.float32(9))
    other = reference_cache.key(changed, tokenizer, model.config)
    said = f"other parameters .its digest is {key.parameters[:16]}, expected {other.parameters[:16]}.; remove it"
    with pytest.raises(ValueError, match=said):
        reference_cache.read(tmp_path / "file", other)


def test_the_digest_of_parameters_is_of_paths_dtypes_shapes_and_bytes():
    def of(params):
        return reference_cache.key(params, None).parameters

    x = jnp.arange(6.0).reshape(2, 3)
    same = [{"a": x, "b": x[0]}, {"b": np.asarray(x[0]), "a": np.asfortranarray(x)}]
    assert of(same[0]) == of(same[1])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    placed = jax.device_put(same[0], jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert of(placed) == of(same[0])
    others = [{"a": x, "c": x[0]}, {"a": x.T, "b": x[0]}, {"a": x.astype(jnp.bfloat16), "b": x[0]}, {"a": x}]
    assert len({of(params) for params in [same[0], *others]}) == 5


def test_another_tokenizer_template_or_setting_is_named(key, tokenizer, merging, tmp_path):
    model, params = tiny()
    reference_cache.write(tmp_path / "file", key, rows())
    rendered, bare = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    rendered.chat_template += "\n"
    bare.add_special_tokens({"pad_token": "</s>"})
    half = dataclasses.replace(model.config, dtype=jnp.bfloat16)
    again = dataclasses.replace(model.config, remat=jax.checkpoint_policies.dots_saveable)  # changes no number
    for wrong, config, names in (
        (rendered, model.config, "template"),
        (merging, model.config, "tokenizer .* and other template"),
        (bare, model.config, "tokenizer"),
        (tokenizer, half, "settings"),
    ):
        with pytest.raises(ValueError, match=rf"file: is stale, made with other {names} \(its digest is \w{{16}}, exp"):
            reference_cache.read(tmp_path / "file", reference_cache.key(params, wrong, config))
    assert (
        reference_cache.read(tmp_path / "file", reference_cache.key(params, tokenizer, again)).keys() == rows().keys()
    )


def test_settings_are_the_same_in_every_process():
    """A function of the same name stands elsewhere there: its address must not count, its name must."""

    def settings(name):
        def attend():
            raise AssertionError

        attend.__qualname__ = name
        config = dataclasses.replace(tiny()[0].config, attention=flash.Choice("tiled XLA", "asked for", attend))
        return reference_cache.key({}, None, config).settings, config  # kept, or both would lie at one address

    (one, _), (same, _), (other, _) = kept = settings("attend"), settings("attend"), settings("attend_splash")
    assert len({repr(config.attention) for _, config in kept}) == 3
    assert one == same != other


@pytest.mark.parametrize("name, said", [("tokens", "nor are its tokens"), ("mask", "the same tokens are, with other")])
def test_a_row_that_is_missing_is_named(name, said):
    changed = pairs(0, 1)
    last = np.flatnonzero(changed["mask"][0, 1])[-1]
    changed[name] = changed[name].copy()
    changed[name][0, 1, last] = 7 if name == "tokens" else False
    with pytest.raises(ValueError, match=rf"row 1 of the batch, tokens \w+, mask \w+ of .* {len(rows())} rows; {said}"):
        reference_cache.fill(changed, rows())


def test_rows_without_a_mask_need_no_entry():
    """Fillers and empty completions, such as both sides of pair 1 here."""
    filled = reference_cache.fill(pairs(1, 2), {})
    assert not pairs(1, 2)["mask"].any() and not filled["ref_logp"].any()


def test_files_of_another_kind_are_refused(key, tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="absent: there is no such file"):
        reference_cache.read(tmp_path / "absent", key)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="text: is not a whole safetensors file"):
        reference_cache.read(tmp_path / "text", key)
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: its format is None; expected 'alignax reference"):
        reference_cache.read(tmp_path / "other", key)
    with pytest.raises(ValueError, match="no rows to write"):
        reference_cache.write(tmp_path / "none", key, {})
