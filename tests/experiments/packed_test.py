"""What `--pack` makes of a script's rows, and scripts that run whole with it on a tiny model."""

import json
from functools import partial
from types import SimpleNamespace

import kto
import numpy as np
import packed
import preference
import pytest
from jax.sharding import AbstractMesh

from alignax import data
from alignax.data import TokenRow, batching

MESH = AbstractMesh((2,), ("data",))
ROWS = [TokenRow(np.full(length, 3, np.int32), np.ones(length, bool)) for length in [4, 6] * 20]
BATCHES = partial(data.batches, collate=batching.supervised, batch_size=16, buckets=[4, 8])


def test_an_update_sees_about_as_many_members(capsys):
    config = SimpleNamespace(pack=20, limit=8, batch_size=16, microbatches=1)
    found = packed.arrange(config, ROWS, BATCHES, MESH)
    # 16 rows of 5 tokens fill 80 / 19 = 4.2 rows of 20, 6 on two devices; 8 is twice what a row holds
    assert found == packed.Packing(20, 6, 8)
    assert "6 packed rows of 20 hold 20.0 members and are 83% full" in capsys.readouterr().out
    batch, position = next(found.stream(BATCHES, ROWS, seed=0))
    assert batch["tokens"].shape == (6, 8, 8) and position == (0, 1)
    assert batch["weights"].sum() == np.count_nonzero(batch["segments"].any(-1)) > 20
    plain = packed.arrange(SimpleNamespace(**vars(config) | {"pack": 0}), ROWS, BATCHES, MESH)
    assert plain == packed.Packing() and "40 rows, 200 tokens" in capsys.readouterr().out
    assert next(plain.stream(BATCHES, ROWS, seed=0))[0]["tokens"].shape == (16, 4)
    assert plain.loss(lambda model: ("loss", model), "model") == ("loss", "model")


@pytest.mark.parametrize("sides, message", [(1, "at least 8, limit=8"), (2, "at least 16, 2 times limit=8")])
def test_too_narrow(sides, message):
    packed.check(SimpleNamespace(pack=0, limit=8), sides=sides)
    packed.check(SimpleNamespace(pack=8 * sides, limit=8), sides=sides)
    with pytest.raises(ValueError, match=message):
        packed.check(SimpleNamespace(pack=8 * sides - 1, limit=8), sides=sides)


OPTIONS = {"steps": 2, "batch_size": 6, "limit": 20, "evaluate_every": 2, "warmup": 1, "learning_rate": 1e-2}


def run(script, tiny_folder, tmp_path, rows, name, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": str(tiny_folder), "data": str(path), "output": tmp_path / name, "held_out": 0.2}
    script.main(script.Config(**given, **OPTIONS | options))
    return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


def test_kto_runs_packed(tiny_folder, tmp_path, capsys, bare):
    answers = [{"prompt": f"q{i}: ", "completion": "yes " * (2 + i % 2), "label": i % 2 == 0} for i in range(24)]
    lines = run(kto, tiny_folder, tmp_path, answers, "out", pack=120, microbatches=2, desirable_weight=1.2)
    assert all(np.isfinite(value) for line in lines for value in line.values()) and lines[1]["kl"] >= 0
    assert lines[2]["held_out/loss"] != lines[0]["held_out/loss"]
    assert "packed rows of 120 hold" in capsys.readouterr().out


def test_what_reads_more_than_the_pairs_is_refused(tmp_path):
    config = preference.Config(model="m", data="d", output=tmp_path / "none", loss="mdpo", pack=200, limit=80)
    with pytest.raises(ValueError, match="pack=200: mdpo needs more than the rows of the pairs"):
        preference.main(config)
