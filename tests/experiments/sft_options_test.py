"""Objectives of the supervised script: trained on each, measured by the likelihood; what means nothing is refused."""

import dataclasses
import json

import pytest
import sft


@pytest.fixture
def config(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {i} " + "ab" * (i % 3)}) + "\n" for i in range(12)))
    return sft.Config(
        model=str(tiny_folder),
        data=str(data),
        output=tmp_path / "out",
        steps=2,
        batch_size=4,
        limit=16,
        truncate="keep_start",
        held_out=0.3,
        evaluate_every=2,
        warmup=1,
    )


def lines(config):
    return [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]


def test_objectives_differ_and_are_measured_alike(config, tmp_path, bare):
    options = {
        "plain": {},
        "dft": {"loss": "dft"},
        "smooth": {"label_smoothing": 0.5, "z_weight": 0.1},
    }
    first, held_out = {}, {}
    for name, option in options.items():
        chosen = dataclasses.replace(config, output=tmp_path / name, **option)
        sft.main(chosen)
        start, one, *_ = lines(chosen)
        first[name], held_out[name] = one, start["held_out/loss"]
    assert len({one["loss/nll"] for one in first.values()}) == 3
    assert first["dft"]["loss/nll"] < first["plain"]["loss/nll"]  # each token times a probability
    z_loss = first["smooth"]["loss/z_loss"]
    assert z_loss > 0 and "loss/z_loss" not in first["plain"]
    assert first["smooth"]["loss"] == pytest.approx(first["smooth"]["loss/nll"] + 0.1 * z_loss, rel=1e-5)
    assert len(set(held_out.values())) == 1  # before training, whatever is trained on


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0; expected less than 1"),
        ({"label_smoothing": float("nan")}, "label_smoothing=nan; expected 0 or more"),
        ({"label_smoothing": 0.1, "loss": "dft"}, "label_smoothing=0.1 with loss=dft; expected cross_entropy"),
        ({"z_weight": -1.0}, "z_weight=-1.0; expected 0 or more"),
        ({"aux_weight": 0.1}, "aux_weight=0.1: .* has no router; expected a mixture of experts"),
        ({"z_weight": float("inf")}, "z_weight=inf; expected a finite number"),
    ],
)
def test_what_means_nothing_is_refused(config, wrong, message):
    with pytest.raises(ValueError, match=message):
        sft.main(dataclasses.replace(config, **wrong))
    assert not (config.output / "metrics.jsonl").exists()
