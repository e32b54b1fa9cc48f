"""The script of single answers runs whole on a tiny model, and refuses what it should."""

import json

import jax.numpy as jnp
import kto
import numpy as np
import pytest

from alignax import data
from alignax.io import hf


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(count):
    return [
        {"prompt": f"q{i}: ", "completion": "no, no, no" if i % 2 else "yes " * (2 + i % 2), "label": i % 2 == 0}
        for i in range(count)
    ]


def config_of(tiny_folder, tmp_path, rows, **options):
    given = {"steps": 4, "batch_size": 6, "microbatches": 2, "limit": 20, "evaluate_every": 2, "warmup": 1}
    given |= {"learning_rate": 1e-2, "held_out": 0.2} | options
    return kto.Config(
        model=str(tiny_folder), data=write(tmp_path / "data.jsonl", rows), output=tmp_path / "out", **given
    )


def lines_of(config):
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(config.steps + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    return lines


def test_kto(tiny_folder, tmp_path, capsys):
    """Ten pairs are ten good and ten bad answers, of which pairs are held out whole."""
    pairs = [{"prompt": f"q{i}: ", "chosen": "yes " * (2 + i % 2), "rejected": f"no, no {i}"} for i in range(10)]
    config = config_of(tiny_folder, tmp_path, pairs, undesirable_weight=0.8)
    result = kto.main(config)
    lines = lines_of(config)
    assert lines[0]["held_out/rewards/margins"] == 0 and result["held_out/rewards/margins"] > 0
    assert result["held_out/loss"] < lines[0]["held_out/loss"] and max(line.get("kl", 0) for line in lines) > 0
    saved, start = hf.load(config.output / "model"), hf.load(tiny_folder)
    assert not np.array_equal(saved.params["embed"]["embedding"], start.params["embed"]["embedding"])
    printed = capsys.readouterr().out
    assert "10 rows read, 10 kept, 0 dropped" in printed and "--- after" in printed
    assert "8 good and 8 bad answers; by their weights good : bad = 1.250" in printed
    assert "mismatched rows: 0.0% of their answers cut off" in printed
    with pytest.raises(ValueError, match="exists and is not empty"):
        kto.main(config)


def test_bco_keeps_the_mean_reward_of_all_rows(tiny_folder, tmp_path, bare):
    config = config_of(tiny_folder, tmp_path, answers(20), loss="bco", microbatches=1)
    kto.main(config)
    lines = lines_of(config)[1:]
    # each batch's mean reward from its classes'; the last batch of an epoch, 16 = 6 + 6 + 4 rows, counts for less
    means = [
        line["desirable_fraction"] * line["rewards/chosen"]
        + (1 - line["desirable_fraction"]) * line["rewards/rejected"]
        for line in lines
    ]
    rows = np.array([6, 6, 4, 6])
    expected = np.cumsum(rows * means) / np.cumsum(rows)
    np.testing.assert_allclose([line["delta"] for line in lines], expected, rtol=1e-4, atol=1e-6)
    assert abs(expected[-1]) > 1e-3


def test_a_class_that_is_missing_has_no_metrics():
    metrics = {"rewards/chosen": jnp.array(0.5), "rewards/rejected": jnp.array(-0.25)}
    alone = {fraction: kto.by_class(metrics | {"desirable_fraction": jnp.array(fraction)}) for fraction in (0.0, 1.0)}
    assert alone[1.0] == {"rewards/chosen": 0.5, "desirable_fraction": 1}
    assert alone[0.0] == {"rewards/rejected": -0.25, "desirable_fraction": 0}
    assert kto.by_class(metrics | {"desirable_fraction": jnp.array(0.2)})["rewards/margins"] == 0.75


def test_the_balance_of_the_classes(tiny_folder, capsys):
    row = data.TokenRow(np.arange(3), np.array([False, True, True]))
    rows = [data.TokenLabelled(row, good) for good in (True, False, False, False)]
    config = kto.Config(model="", data="", output="")  # type: ignore
    with pytest.warns(UserWarning, match=r"= 0\.333; .* recommend 1 to 4/3, a desirable_weight of 3 to 4"):
        kto.print_balance(config, rows)
    kto.print_balance(kto.Config(model="", data="", output="", desirable_weight=4.0), rows)  # type: ignore
    assert "1 good and 3 bad answers; by their weights good : bad = 1.333" in capsys.readouterr().out
    kto.print_balance(config, rows[:1])
    assert "one class weighs nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 1, "microbatches": 1}, "batch_size=1; expected at least 2: kto pairs each prompt with another"),
        ({"beta": 0.0}, r"beta=0\.0; expected a number above 0"),
        ({"beta": float("nan")}, r"beta=nan; expected a number above 0"),
        ({"undesirable_weight": -1.0}, r"undesirable_weight=-1\.0; expected 0 or more"),
        ({"loss": "bco", "desirable_weight": 2.0}, r"desirable_weight=2\.0; bco has no such weight, expected 1"),
        ({"loss": "apo_zero_unpaired", "undesirable_weight": 2.0}, "apo_zero_unpaired has no such weight"),
        ({"microbatches": 4}, "6 rows do not divide into 4 parts"),
        ({"limit": 4096}, "limit=4096; expected at most 2048, the model's context"),
        ({"label": "kto_tag"}, r"no label: found the columns \['label'\], expected 'kto_tag'"),
    ],
)
def test_refusals(tiny_folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        kto.main(config_of(tiny_folder, tmp_path, answers(12), **change))
    assert not (tmp_path / "out").exists()


def test_data_without_answers_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ValueError, match="no answers; expected prompt and completion, or messages, and label"):
        kto.main(config_of(tiny_folder, tmp_path, [{"prompt": "a"}] * 4))
    with pytest.raises(ValueError, match="wrong label: 'good' in 'label'; expected true or false"):
        kto.main(config_of(tiny_folder, tmp_path, [*answers(4), answers(1)[0] | {"label": "good"}]))
    assert not (tmp_path / "out").exists()


def test_help_explains_every_field(capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(kto.Config, args=["--help"])
    printed = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in printed for name in kto.Config.__dataclass_fields__)
