"""The reference's log-probabilities once ahead instead of in every update, and an optimizer that takes less memory."""

import json

import jax
import numpy as np
import preference
import pytest

from alignax.io import hf

PAIRS = [{"prompt": f"{i}? ", "chosen": "yes", "rejected": "no"} for i in range(20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)) + "\n")
    return path


def options(folder, data, **changes):
    fixed = {"steps": 2, "batch_size": 4, "limit": 40, "evaluate_every": 2, "learning_rate": 1e-3, "warmup": 1}
    return preference.Config(**{"model": str(folder), "data": str(data), **fixed, **changes})


def test_a_cached_reference_gives_the_same_run_and_is_refused_when_stale(tiny_folder, data, tmp_path, capsys, bare):
    file = tmp_path / "reference.safetensors"
    expected = preference.main(options(tiny_folder, data, output=tmp_path / "plain"))
    small = {"output": tmp_path / "cached", "cache_reference": file, "offload": True}
    found = preference.main(options(tiny_folder, data, **small))
    assert f"reference: log-probabilities of 40 completions; {file}" in capsys.readouterr().out
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)

    more = tmp_path / "more.jsonl"
    more.write_text(data.read_text() + json.dumps({"prompt": "A new one? ", "chosen": "yes", "rejected": "no"}) + "\n")
    changed = {"output": tmp_path / "out", "cache_reference": file}
    with pytest.raises(ValueError, match=r"row \d+ of the batch, tokens .* is not among the 40 rows"):
        preference.main(options(tiny_folder, more, **changed))  # the file itself was read
    loaded = hf.load(tiny_folder)
    scale = loaded.params["final_norm"]["scale"]
    loaded.params["final_norm"]["scale"] = scale.at[3].set(np.nextafter(np.float32(scale[3]), np.float32(2)))
    hf.save(tmp_path / "moved", loaded.model, loaded.params, loaded.tokenizer)
    with pytest.raises(
        ValueError, match=r"reference.safetensors: is stale, made with other parameters \(its digest is"
    ):
        preference.main(options(tmp_path / "moved", data, **changed))
    with pytest.raises(ValueError, match=r"is stale, made with other settings \(its digest is"):
        preference.main(options(tiny_folder, data, bfloat16=True, **changed))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precompute_reference": True, "loss": "simpo"}, "precompute_reference: simpo has no reference"),
        ({"precompute_reference": True, "reference": "ema"}, "the reference moves, reference='ema'; expected fixed"),
        ({"cache_reference": "file", "reference": "sdpo"}, "cache_reference='file': the reference moves"),
        ({"precompute_reference": True, "loss": "tdpo2"}, r"tdpo2 needs \['forward_kl'\], not only log-prob"),
        ({"precompute_reference": True, "loss": "mdpo"}, r"mdpo needs \['degraded_logp'\], not only log-prob"),
    ],
)
def test_what_log_probabilities_alone_do_not_say_is_refused(data, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        preference.main(options("unread", data, output=tmp_path / "out", **change))


def test_moments_of_the_script_are_compressed_and_clipped_together():
    """The optimizer of the flags: clipping sees all gradients, the moments are in bytes."""
    import common

    params = {"kernel": np.ones((64, 64), np.float32), "bias": np.ones(64, np.float32)}
    optimizer = common.make_optimizer(1e-3, steps=2, bits=8, offload=True)
    updates, state = jax.jit(optimizer.update)(jax.tree.map(np.ones_like, params), optimizer.init(params), params)
    bias, kernel = state[1].leaves
    assert kernel.values[0].nu["kernel"].dtype == np.uint8 and bias.values[0].nu["bias"].dtype == np.float32
    clipped = 1 / (64 * 64 + 64) ** 0.5  # of the norm of all ones
    np.testing.assert_allclose(bias.values[0].mu["bias"], 0.1 * clipped, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -1e-3, rtol=0.01)
