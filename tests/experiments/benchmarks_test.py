"""The arithmetic and the command lines of the benchmarks, and tiny runs of them on the CPU."""

import argparse
import importlib
import json
import pathlib

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def decode_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("decode_gpu")


def config(decode_gpu):
    shape = decode_gpu.LLAMA
    return decode_gpu.timing.llama(shape, max_positions=1024, dtype="bfloat16", tie_embeddings=True).config


@pytest.mark.parametrize(
    "batch, group, slots",
    [
        (8, 1, 8 * 511 + 8 * 256.5),  # every row reads a prompt of its own, and 1 to 512 tokens: 256.5 in the mean
        (64, 8, 8 * 511 + 64 * 256.5),  # eight prompts are read once for eight rows each
    ],
)
def test_the_floor_by_hand(decode_gpu, batch, group, slots):
    """A token holds 16 layers x 8 key heads x 64 channels x 2 bytes of keys, and as much of values: 32 KiB."""
    args = decode_gpu.parse([])
    found = decode_gpu.floor_bytes(config(decode_gpu), 2_471_628_800, args, batch, group)
    assert found == 2_471_628_800 + 32_768 * slots


def test_readings_by_hand(decode_gpu):
    """A step of 10 ms after a prefill of 90 ms: 11 tokens are there after 200 ms."""
    found = decode_gpu.readings(0.1, 0.2, 4, 11)
    assert found["ms_per_step"] == pytest.approx(10) and found["prefill_ms"] == pytest.approx(90)
    assert found["tokens_per_second"] == pytest.approx(220)
    assert found["decode_tokens_per_second"] == pytest.approx(400)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batches", "8", "12"], "--batches 12 is not a multiple of --groups 8"),
        (["--new-tokens", "1"], "--new-tokens 1: a step is told from the prefill"),
    ],
)
def test_what_cannot_be_measured_is_refused(decode_gpu, capsys, words, message):
    with pytest.raises(SystemExit):
        decode_gpu.parse(words)
    assert message in capsys.readouterr().err


def test_a_tiny_table(decode_gpu, monkeypatch, tmp_path, capsys):
    """Two groups of one batch, beside a peer whose seconds are given, and one that finds no memory."""
    peer = {"torch": "2", "device": "cpu", "seconds": {"8": [1.0, 1.0 + 47 * 0.02]}}
    time_batch, output = decode_gpu.time_batch, ["--json", str(tmp_path / "out.json")]

    def of_two_groups(args, model, params, batch, group):
        if group == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")
        return time_batch(args, model, params, batch, group)

    monkeypatch.setattr(decode_gpu, "time_batch", of_two_groups)
    monkeypatch.setattr(decode_gpu, "run_peer", lambda args: peer)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    monkeypatch.setattr("sys.argv", ["decode_gpu.py", "--tiny", "--peer", "--groups", "1", "8", "4", *output])
    decode_gpu.main()
    report = json.loads((tmp_path / "out.json").read_text())
    first, second, third = report["rows"]
    assert (first["group"], second["group"]) == (1, 8)
    assert first["floor_bytes"] - second["floor_bytes"] == 7 * 15 * 2 * 2 * 2 * 16 * 2  # seven prompts fewer
    assert first["peer"]["ms_per_step"] == pytest.approx(20)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("decode attention: plain XLA") and len(printed) == 7
    assert third["failed"] and printed[5].split(":")[0] == "    8     4  failed"
    assert printed[-1] == "peer: transformers' generate, torch 2, device cpu"


@pytest.fixture
def script(monkeypatch):
    """Imports a benchmark by name; its probe is not the test's business."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("timing"), "probe", lambda *_: 450.0)
    return importlib.import_module


@pytest.fixture
def traced(script, monkeypatch):
    """Updates whose loss is traced and nothing compiled, and the batches they were made for."""
    updates, batches = script("updates"), []

    def compiled(loss_fn, params, batch, frozen=None, *, microbatches=1):
        terms, _ = jax.eval_shape(loss_fn, params, batch, frozen, {})
        assert terms and microbatches == 1
        batches.append(batch)
        return updates.Update(lambda _=None: {"grad_norm": 0.0}, lambda: params, 2**20, 4.0)

    monkeypatch.setattr(updates, "compiled", compiled)
    return batches


def test_rounds_that_count(script):
    """Probes of 405 to 445 agree to 10 %; 396 is below the floor, 400 to 441 is too far apart."""
    turns = script("turns")
    probes, seconds = iter([405, 445, 410, 396, 400, 405, 400, 441, 430]), iter([2.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    args = argparse.Namespace(rounds=3, least_gflops=400)
    runs = {"ours": lambda: next(seconds), "theirs": lambda: next(seconds)}
    found = turns.rounds(runs, lambda: next(probes), args)
    assert [x["counts"] for x in found] == [True, False, False]
    assert turns.medians(found) == {"ours": 2.0, "theirs": 1.0}
    assert turns.ratios(found, "ours")["theirs"] == 0.5 and turns.peak(found) == 410
    assert turns.tally(found) == "1 of 3 rounds count, probe 410 GFLOP/s"
    assert "NO READING" in turns.tally(found[1:]) and turns.medians(found[1:])["ours"] == 9
    assert turns.between([0.0, 5.0, 6.0, 8.0], warm=1) == [1.0, 2.0]


def test_operations_by_hand(script):
    """A layer of the 7.1 M Llama has 256 x (2 x 64 x 6 + 3 x 688) parameters, its head 256 x 8192."""
    layers, head = 4 * 256 * (2 * 64 * 6 + 3 * 688), 256 * 8192
    args = {"work": "dpo", "layout": "rows", "prompt_length": 64}
    found = script("update_peers").operations(argparse.Namespace(**args))
    assert found["alignax"] == 8 * (layers * 16 * 256 + head * 16 * 192)
    assert found["cached"] == 6 * (layers * 16 * 256 + head * 16 * 192)
    args |= {"layout": "shared"}
    found = script("update_peers").operations(argparse.Namespace(**args))
    assert found["alignax"] == 8 * (layers * (8 * 64 + 16 * 192) + head * 16 * 192)
    args |= {"work": "grpo"}
    found = script("update_peers").operations(argparse.Namespace(**args))
    assert found["alignax"] == (2 + 8) * (layers * (4 * 64 + 32 * 128) + head * 32 * 128)


def test_operations_of_attention_by_hand(script):
    """One pair of 1 + 1 tokens: a completion's token sees 1 + 1/2, a prompt's 1/2, each in 4 operations a channel."""
    update_gpu = script("update_gpu")
    args = update_gpu.parse(["--tiny"])
    args.length = 2
    channels = 2 * 2 * 16
    assert update_gpu.operations(args, "tiny", "dpo")["attention"] == 4 * 4 * channels * 2 * (1.5 + 0.5)
    args.layout = "shared"
    found = update_gpu.operations(args, "tiny", "dpo")
    assert found["fed"] == 3 and found["attention"] == 4 * 4 * channels * (2 * 1.5 + 0.5)


def test_a_tiny_head(script, tmp_path, capsys):
    """The three forms say the same."""
    path = tmp_path / "head.json"
    script("head").main(["--tiny", "--json", str(path)])
    values = list(json.loads(path.read_text())["values"].values())
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_tiny_shared_prompts(script, traced, capsys):
    script("shared_prompts").main(["--tiny"])
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith("64+192 x 2") and " 1.14 fewer " in row and len(traced) == 2


def test_a_tiny_packing(script, traced, capsys):
    """Padded rows of 32 are the emptiest, and an epoch shows every pair once in each form."""
    script("packing").main(["--tiny"])
    fill = [float(line.split()[4].rstrip("%")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert fill[0] < fill[1] < fill[2]
    assert {len(batch.tokens.shape) for batch in traced} == {3, 4}


def test_a_tiny_compile_time(script, traced, capsys):
    script("compile_time").main(["--tiny", "--layers", "2"])
    assert capsys.readouterr().out.splitlines()[1:] == ["   2 layers    4.00 s   1.00 x"] and len(traced) == 1


def test_a_tiny_update_gpu(script, traced, monkeypatch, capsys):
    """In this process, beside a peer that finds no memory."""
    update_gpu = script("update_gpu")

    def run(args, worker, more):
        if worker == "peer":
            return {"failed": "torch\nout of memory"}
        parsed = update_gpu.parse(["--tiny", *more])
        vars(parsed).update(models=more[1:2], works=more[3:4])
        return update_gpu.WORKERS[worker](parsed)

    monkeypatch.setattr(update_gpu, "run", run)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    update_gpu.main(["--tiny", "--peer", "--works", "sft", "dpo"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and len(traced) == 2
    assert printed[3] == "tiny sft  peer  failed: out of memory"


def test_a_batch_without_whole_groups_is_refused(script, capsys):
    with pytest.raises(SystemExit):
        script("update_gpu").parse(["--rows", "12"])
    assert "--rows 12 hold no whole pairs and groups" in capsys.readouterr().err
