"""The arithmetic and the command line of the GPU benchmark, and one row of its table on the CPU."""

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
