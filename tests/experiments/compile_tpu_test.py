"""Reading compiled programs: texts written by hand, a program of eight simulated devices, a TPU's with libtpu."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import compile_tpu
import hlo
import hlo_costs
import jax
import numpy as np
import pytest
import tpu_chips
import tpu_programs
import tpu_table
from jax.sharding import Mesh

from alignax import sharding

EXPERIMENTS = pathlib.Path(compile_tpu.__file__).parent

# Six rounds of: a product [64, 32] x [32, 16] in a fusion, and a sum over two of four devices, of which a gather that
# overlaps with work is named three times. Before it a loop whose end is in the data; one round of it gathers 256 bytes.
TEXT = (pathlib.Path(__file__).parent / "loops.hlo").read_text()


def test_a_text_is_read_with_its_loops():
    module, asked = hlo.parse(TEXT), []

    def unknown(module, loop):
        asked.append((loop.name, module.files(loop)))
        return 5

    times = hlo.executions(module, unknown)
    assert asked == [("unsure", ("/somewhere/blockwise.py", "/somewhere/train.py"))]
    assert times["body"] == times["fused"] == 6 and times["body.1"] == 5 and times["main"] == 1
    assert hlo.fused(module) == {"fused", "started", "done", "all-reduce-scatter.1"}


def test_costs_are_those_written_out():
    found = hlo_costs.costs(hlo.parse(TEXT), unknown=lambda module, loop: 5)
    assert found.flops == 6 * 2 * 64 * 32 * 16
    sent = {
        "all-gather": 6 * 8 * 4,  # once a round, for all that it is named twice
        "all-reduce": 6 * 64 * 16 * 4,  # 2 (n - 1) / n of it, n = 2
        "reduce-scatter": 4 * 4 * 4 * 3 / 4,
        "all-to-all": 0,
        "collective-permute": 5 * 4 * 4 * 4,
    }
    assert found.sent() == sent
    product = 64 * 32 * 4 + 32 * 16 * 2 + 4  # a slice of the kernels; the result stays on the chip
    summed, begun, ended = 64 * 16 * 4, 8 * 4 + 24 * 4, 8 * 4 + 24 * 4 + 16 * 4
    rounds = 6 * (product + summed + begun + ended + 4 + 4 + 4)  # and the counter's addition
    assert found.read_written == pytest.approx(rounds + 5 * 2 * 64 + 64 + 16, rel=0.02)


def test_the_taps_of_a_convolution_that_meet_padding_are_not_counted():
    text = """ENTRY %main (a: f32[5,3], b: f32[4,3,7]) -> f32[5,7] {
  %a = f32[6,5,3]{2,1,0} parameter(0)
  %b = f32[6,3,7]{2,1,0} parameter(1)
  ROOT %r = f32[6,5,7]{2,1,0} convolution(%a, %b), WINDOW, dim_labels=0bf_0io->0bf
}
""".replace("WINDOW", "window={size=6 stride=5 pad=0_0 lhs_dilate=6}")
    found = hlo_costs.costs(hlo.parse(text), unknown=lambda module, loop: 1)
    assert found.flops == 2 * 6 * 5 * 3 * 7  # a batched product, as XLA writes one for a TPU


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")


EIGHT = """
import json, hlo, hlo_costs, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
def f(x, w):
    def layer(x, w):
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ w[0]) @ w[1], NamedSharding(mesh, P("data"))), None
    return jax.lax.scan(layer, x, w)[0]
at = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))
w = (at((5, 32, 64), None, None, "tensor"), at((5, 64, 32), None, "tensor", None))
text = jax.jit(f).lower(at((16, 32), "data"), w).compile().as_text()
found = hlo_costs.costs(hlo.parse(text), unknown=lambda module, loop: 1 / 0)
print(json.dumps([found.flops, found.sent(), found.read_written]))
"""


def run(code, env):
    paths = os.pathsep.join([str(EXPERIMENTS), str(EXPERIMENTS.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | env | {"PYTHONPATH": paths}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_program_of_eight_devices_as_compiled_here():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    flops, sent, moved = run(EIGHT, {"XLA_FLAGS": flags})
    assert flops == 5 * 2 * 2 * 16 * 32 * 64 / 8
    assert sent["all-reduce"] == 5 * (16 // 4) * 32 * 4  # over two devices: as many bytes as a device's rows have
    assert sum(sent.values()) == sent["all-reduce"]
    assert moved > 5 * 2 * 32 * 32 * 4  # every kernel is read


def one_device():
    return Mesh(np.array(jax.devices()[:1]).reshape((1,) * len(sharding.AXES)), sharding.AXES)


def test_what_an_update_is_given_and_what_its_model_asks_for():
    config, mesh = tpu_programs.config_of("tiny", "nothing"), one_device()
    layer = 4 * 256 * 256 + 3 * 256 * 512
    parameters = 2 * 1024 * 256 + 2 * (layer + 2 * 256) + 256
    asked = tpu_programs.update("dpo", config, mesh, batch=8, length=128, parts=2)
    assert asked.kinds["parameters"] == 4 * parameters
    assert asked.kinds["optimizer"] == 8 * parameters + 4  # two moments and the number of steps
    assert asked.kinds["reference"] == 2 * parameters
    assert asked.kinds["batch"] == 8 * 128 * (4 + 4 + 1)
    multiplied = 2 * layer + 1024 * 256 + 2 * 4 * 64 * 128  # the last: scores and values, of half a row, in 2 layers
    assert asked.model_flops == 8 * 8 * 128 * multiplied


def test_a_shape_comes_from_a_config_json_too(tiny_folder):
    config = tpu_programs.config_of(str(tiny_folder), "qkv,attended")
    source = json.loads((tiny_folder / "config.json").read_text())
    assert (config.hidden_size, config.num_layers) == (source["hidden_size"], source["num_hidden_layers"])
    assert config.dtype == "bfloat16" and config.param_dtype == "float32"


def test_the_roofline_names_what_binds():
    sent = hlo_costs.Collective("all-gather", 5, 25 * 10**9, 2, "")  # 200 GB over a ring of 100 GB/s
    found = hlo_costs.Costs(197e12, 819e9 / 2, 0, (sent,))
    assert tpu_chips.roofline(found, tpu_chips.chip_of("v5e:4x4")) == (1.0, 0.5, 2.0)
    assert tpu_chips.roofline(found, tpu_chips.CHIPS["v5e"]).bound == "interconnect"
    with pytest.raises(ValueError, match="v3"):
        tpu_chips.chip_of("v3:4x4")


PUT = """%put (c: bf16[64,512,128], at: s32[64], new: bf16[64,128]) -> bf16[64,512,128] {
  %c = bf16[64,512,128]{2,1,0} parameter(0)
  %at = s32[64]{0} parameter(1)
  %new = bf16[64,128]{1,0} parameter(2)
  ROOT %filled = bf16[64,512,128]{2,1,0} scatter(%c, %at, %new), update_window_dims={1}, to_apply=%assign
}

ENTRY %main (c.1: bf16[64,512,128], at.1: s32[64], new.1: bf16[64,128]) -> bf16[64,512,128] {
  %c.1 = bf16[64,512,128]{2,1,0} parameter(0)
  %at.1 = s32[64]{0} parameter(1)
  %new.1 = bf16[64,128]{1,0} parameter(2)
  ROOT %r = bf16[64,512,128]{2,1,0} fusion(%c.1, %at.1, %new.1), kind=kInput, calls=%put
}
"""


def test_a_cache_that_is_written_in_place_is_not_moved():
    found = hlo_costs.costs(hlo.parse(PUT), unknown=lambda module, loop: 1)
    assert found.read_written == 64 * 4 + 2 * 64 * 128 * 2  # places, and what is put there, read and written


CALL = """ENTRY %main (t: s8[1,2,2], q: bf16[ROWS4,1024,64], k: bf16[ROWS2,1024,64]) -> bf16[ROWS4,1024,64] {
  %t = s8[1,2,2]{2,1,0} parameter(0)
  %q = bf16[ROWS4,1024,64]{2,1,0} parameter(1)
  %k = bf16[ROWS2,1024,64]{2,1,0} parameter(2)
  ROOT %splash_mha_KIND.1 = bf16[ROWS4,1024,64]{2,1,0} custom-call(%t, %q, %k), custom_call_target="tpu_custom_call"
}
"""


@pytest.mark.parametrize("kind, products", [("fwd_residuals", 2), ("dkv_segmented", 4), ("dq_segmented", 3)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_kernel_of_attention_counts_the_blocks_up_to_the_diagonal(kind, products, rows):
    text = CALL.replace("ROWS", f"{rows}," if rows > 1 else "").replace("KIND", kind)  # one row has no axis of its own
    found = hlo_costs.costs(hlo.parse(text), unknown=lambda module, loop: 1, kernel=tpu_chips.kernel_flops)
    blocks = sum(1 for queries in range(2) for keys in range(2) if keys <= queries)
    assert found.flops == rows * 4 * products * blocks * 2 * 512 * 512 * 64


def test_the_table_divides_by_what_the_chip_has(tmp_path, monkeypatch):
    sent = hlo_costs.Collective("all-gather", 5, 25 * 10**9, 1, "")
    costs = hlo_costs.Costs(394e12, 819e9, 0, (sent,))
    kinds, chip = {"parameters": 3 * 10**9, "batch": 10**9}, tpu_chips.CHIPS["v5e"]
    found = compile_tpu.Found(7.0, kinds, 4 * 10**9, 2 * 10**9, 0, costs, 2e14, chip)
    case = {"model": "llama-8b", "topology": "v5e:4x4", "fsdp": 8, "tensor": 2, "batch": 32}
    monkeypatch.setattr(tpu_table, "PARTS", (("One", (case,)),))
    monkeypatch.setattr(tpu_table, "version", lambda name: "1.0")
    measured = []
    for _ in range(2):  # the second time it is kept
        path = tmp_path / "table.md"
        tpu_table.write(path, tmp_path, lambda config: measured.append(config) or found, compile_tpu.Config)
    assert measured == [compile_tpu.Config(**case)]
    header, _, row = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    ]
    assert len(header) == len(row)
    assert row[:6] == ["llama-8b", "sft", "v5e:4x4", "fsdp 8, tensor 2", "32", "4096"]
    assert row[6:10] == ["4.00", "2.00", "6.00", "17.18"]
    assert row[-6:] == ["2.000", "1.000", "1.000", "2.000", "compute", "7"]


SMALL = """
import dataclasses, json, compile_tpu, tpu_table
config = compile_tpu.Config(model="tiny", topology="v5e:2x2", fsdp=2, tensor=2, batch=8, length=128)
found = compile_tpu.measure(config)
print(compile_tpu.report(config, found))
print(json.dumps(tpu_table.plain(found)))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, of the extra tpu-compile")
def test_an_update_compiles_for_a_small_topology():
    found = run(SMALL, {"XLA_FLAGS": ""})
    parameters = found["kinds"]["parameters"]
    config = tpu_programs.config_of("tiny", "nothing")
    whole = tpu_programs.update("sft", config, one_device(), batch=8, length=128, parts=1)
    assert whole.kinds["parameters"] / 4 <= parameters <= whole.kinds["parameters"] / 3.9  # norms are on all
    assert found["model_flops"] == whole.model_flops / 4
    assert 1 <= found["flops"] / found["model_flops"] < 2  # recomputation, and the kernel's whole blocks
    assert found["total"] < 2**30 and found["sent"]["all-reduce"] > 0


def test_the_table_as_committed_lists_the_cases_that_there_are():
    lines = (EXPERIMENTS / "tpu.md").read_text().splitlines()
    rows = [tuple(line.strip("| ").split(" | "))[:3] for line in lines if line.startswith(("| llama", "| mixtral"))]
    cases = [compile_tpu.Config(**case) for _, part in tpu_table.PARTS for case in part]
    assert rows == [(case.model, case.algorithm, case.topology) for case in cases]
