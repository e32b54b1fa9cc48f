import json
import subprocess
import sys

import numpy as np
import pytest

from alignax.data import TokenRow
from alignax.data.inspect import main, paint, pieces


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = family("chatml")
    tokenizer.save_pretrained(path)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (path / "config.json").write_text('{"eos_token_id": 2}')
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return path


@pytest.fixture
def write(tmp_path):
    def file(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return file


TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo\n"}]}


def table(text):
    """(word, check) to count and first offender."""
    rows = {}
    for line in text.splitlines():
        for word in ("ok", "FAILED", "warning", "left out"):
            if line.startswith(f"{word:8s} "):
                name, count = line[9:41].strip(), line[42:].split()[0]
                rows[word, name] = (int(count), line.partition("first: ")[2])
    return rows


def test_good_data(folder, write, capsys):
    path = write(TALK, {"messages": [{"role": "user", "content": "hi"}]})
    assert main([str(path), "--model", str(folder), "--limit", "99"]) == 0
    out = capsys.readouterr().out
    assert f"--- {path}:1: 26 tokens, 4 trained on" in out
    assert "|↵\n|<|im_start|>|a|s|s|i|s|t|a|n|t|↵\n⟦y|o|↵\n|<|im_end|>⟧↵\n" in out
    assert f"=== {path}: 2 rows read, 1 kept, 1 left out" in out
    assert "tokens of a row: mean 26.0, p50 26, p95 26, max 26" in out
    assert "limit 99: 0 of 1 rows longer (0.0%), drop\ntrained on: 4 of 26 tokens" in out
    checks = ("EOS trained", "no double BOS", "prompt an exact prefix", "no empty mask", "no special token spelled out")
    assert table(out) == {
        **{("ok", check): (0, "") for check in checks},
        ("left out", "no reply"): (1, f"{path}:2: no reply: the last of 1 messages is the user's"),
    }


def test_pairs_and_truncation(folder, write, capsys):
    pairs = [{"prompt": "a" * n, "chosen": "b", "rejected": "c"} for n in (5, 2, 6)]
    path = write(*pairs)
    assert main([str(path), "--model", str(folder), "--limit", "7", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert f"--- {path}:2 chosen: 5 tokens" in out and f"--- {path}:2 rejected: 5 tokens" in out
    assert f"limit 7: 2 of 3 rows longer (66.7%), drop; first {path}:1 with 8" in out
    assert "mean 7.3, p50 8, p95 9, max 9" in out
    assert main([str(path), "--model", str(folder), "--limit", "7", "--truncate", "keep_start"]) == 1
    assert table(capsys.readouterr().out)["FAILED", "no empty mask"][0] == 1


def test_prompts_and_columns(folder, write, capsys):
    path = write({"question": "a", "answer": 3})
    assert main([str(path), "--model", str(folder), "--columns", "question=prompt"]) == 0
    out = capsys.readouterr().out
    assert "no limit" in out and set(table(out)) == {("ok", "no double BOS"), ("ok", "no special token spelled out")}


def test_options_that_change_the_masks(folder, write, capsys):
    path = write({"messages": TALK["messages"] * 2})
    for options, count in ((["--every-turn"], 8), (["--masks", "by_prefix"], 4)):
        assert main([str(path), "--model", str(folder), *options]) == 0
        assert f"trained on: {count} of 52 tokens" in capsys.readouterr().out


def test_eos_of_the_folder(folder, write, capsys, tmp_path, family):
    family("chatml").save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"eos_token_id": 2}')
    assert main([str(write(TALK)), "--model", str(tmp_path / "other")]) == 1
    assert "a turn ends with ['<|im_end|>'], and sampling with one of ['</s>']" in capsys.readouterr().out


ERRORS = {
    "no data": (["absent.jsonl"], "absent.jsonl does not exist"),
    "no markers": (["--masks", "by_markers"], "the chat template has no {% generation %} markers"),
    "no model": (["--model", "absent"], "absent: there is no such folder"),
    "no such column": (["--columns", "a=b"], "missing field: expected ['a'] to rename, found ['messages']"),
}


@pytest.mark.parametrize("given, message", ERRORS.values(), ids=ERRORS)
def test_errors(folder, write, capsys, given, message):
    data = [] if given[0].endswith("jsonl") else [str(write(TALK))]
    assert main([*data, "--model", str(folder), *given]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and not captured.out


def test_a_renaming_without_a_sign(folder, write, capsys):
    with pytest.raises(SystemExit):
        main([str(write(TALK)), "--model", str(folder), "--columns", "question"])
    assert "'question'; expected OLD=NEW" in capsys.readouterr().err


def test_colours(tokenizer):
    row = TokenRow(np.array([1, *tokenizer("a\n\x1b", add_special_tokens=False).input_ids, 2]), np.arange(5) > 1)
    g, d, off = "\x1b[32m", "\x1b[2m", "\x1b[0m"
    special, odd = "\x1b[7m", "\x1b[4m"
    assert paint(tokenizer, row) == (
        f"{d}{special}<s>{off}{d}{odd}a{off}{g}↵{off}\n{g}{off}{g}{special}{odd}<unk>{off}{g}{special}</s>{off}"
    )
    assert paint(tokenizer, row, colour=False) == "<s>|a⟦↵\n|<unk>|</s>⟧"


def test_control_characters_reach_no_terminal(bytewise):
    ids = np.array(bytewise("a\x1b[2Jé", add_special_tokens=False).input_ids)
    shown = paint(bytewise, TokenRow(ids, ids > 0), colour=False)
    assert shown == "⟦a|\\x1b|[|2|J||é⟧"


def test_pieces_put_together_are_the_text(spaced, bytewise):
    for tokenizer, text, expected in (
        (spaced, "ab  c", ["a", "b", " ", " ", "c"]),
        (bytewise, "é€x", ["", "é", "", "", "€", "x"]),
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        got = list(pieces(tokenizer, ids))
        assert "".join(got) == text and [p for p in got if p or tokenizer is bytewise] == expected


def test_from_the_command_line(folder, write):
    """No terminal, so no colours; nothing else on the way (the warning about PyTorch, say)."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "alignax.data.inspect", str(write(TALK)), "--model", str(folder)],
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "⟦y|o|↵\n|<|im_end|>⟧" in run.stdout and "\x1b" not in run.stdout
