"""Shows what a data set becomes: `python -m alignax.data.inspect DATA --model FOLDER`.

Prints some rows token by token, what is trained on in green (in brackets without colours) and the rest dim, then what
`checks` finds in all rows. Only the tokenizer of the model is read. Ends with 1 if training would go wrong: a turn
without EOS, two BOS, a prompt that is no prefix, an empty mask, no row left; with 2 if the data cannot be read.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from alignax.data import chat, masks, truncation
from alignax.data.checks import BOS, FATAL, SPELLED, UNLIMITED, Audit, audit
from alignax.data.formats import Prompt, parse
from alignax.data.rows import BadRow
from alignax.data.sources import read
from alignax.data.tokens import TokenRow

TRUNCATIONS = {f.__name__: f for f in (truncation.keep_start, truncation.keep_end, truncation.drop, truncation.refuse)}
MASKS = {f.__name__: f for f in (masks.automatic, masks.by_markers, masks.by_prefix)}
GREEN, DIM, RED, YELLOW, SPECIAL, OFF = "\x1b[32m", "\x1b[2m", "\x1b[31m", "\x1b[33m", "\x1b[7m", "\x1b[0m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the inspector and returns its exit status."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    colour = not options.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    try:
        tokenizer, eos_ids = _read_model(Path(options.model))
        bad: list[BadRow] = []
        items, _ = parse(read(options.data), columns=dict(options.columns), drop=True, note=bad.append)
        found = audit(
            tokenizer,
            items,
            eos_ids=eos_ids,
            limit=options.limit or UNLIMITED,
            truncate=TRUNCATIONS[options.truncate],
            every_turn=options.every_turn,
            masks=MASKS[options.masks],
            bad=bad,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in [row for row in found.rows if row.sides][: options.rows]:
        for name, side in zip((" chosen", " rejected") if len(row.sides) > 1 else ("",), row.sides):
            print(f"--- {row.where}{name}: {side.length} tokens, {int(side.mask.sum())} trained on")
            print(paint(tokenizer, side, colour=colour))
    asked = bool(items) and isinstance(items[0], Prompt)
    print("\n".join(_table(found, options, (BOS, SPELLED) if asked else (*FATAL, SPELLED), colour)))
    return int(found.fatal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m alignax.data.inspect", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("data", help="a file, a folder or the id of a data set, in any format of alignax.data")
    add("--model", required=True, metavar="FOLDER", help="a Hugging Face folder; only its tokenizer is read")
    add("--rows", type=int, default=3, metavar="N", help="rows to print (3)")
    add("--limit", type=int, default=None, metavar="TOKENS", help="the most tokens of a row (no limit)")
    add("--truncate", choices=sorted(TRUNCATIONS), default="drop", help="what becomes of longer rows (drop)")
    add("--every-turn", action="store_true", help="train on the assistant's earlier messages too")
    add("--masks", choices=sorted(MASKS), default="automatic", help="how turns are found (automatic)")
    add("--columns", type=_renaming, nargs="*", default=[], metavar="OLD=NEW", help="columns to rename")
    add("--no-color", action="store_true", help="no colours, as when NO_COLOR is set or nobody watches")
    return parser


def _renaming(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not (old and separator and new):
        raise argparse.ArgumentTypeError(f"{text!r}; expected OLD=NEW")
    return old, new


def _read_model(folder: Path) -> tuple[Any, tuple[int, ...]]:
    # The tokenizer, and where sampling stops, as `alignax.io.hf` finds it.
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in record.getMessage())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found = [tokenizer.eos_token_id]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            found.append(json.loads((folder / name).read_text()).get("eos_token_id"))
    ids = next((ids for ids in reversed(found) if ids is not None), [])
    return tokenizer, tuple(ids) if isinstance(ids, list) else (ids,)


def paint(tokenizer: Any, row: TokenRow, *, colour: bool = True) -> str:
    """A row's tokens as text: trained on green and the rest dim, or in ⟦ ⟧ and bare; token by token underlined, or `|`.

    Line ends are shown, other control characters escaped; special tokens stand out. Bytes of one character are shown
    with the last of them.
    """
    special, out = chat.special_tokens(tokenizer), []
    shown = [_visible(piece) for piece in pieces(tokenizer, row.tokens.tolist())]
    before = False
    for t, (token, on, piece) in enumerate(zip(row.tokens.tolist(), row.mask.tolist(), shown)):
        if colour:
            style = (GREEN if on else DIM) + (SPECIAL if token in special else "") + ("\x1b[4m" if t % 2 else "")
            out.append("".join(f"{style}{line}{OFF}\n" for line in piece.split("\n"))[:-1])
        else:
            border = {(False, True): "⟦", (True, False): "⟧"}.get((before, on), "|" if t else "")
            out.append(border + piece)
        before = on
    return "".join(out) + ("⟧" if before and not colour else "")


def pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """What each token adds to the text of those before it."""
    start, done = 0, 0  # the piece before the last is the context: alone, a token may lose its leading space
    for end in range(1, len(ids) + 1):
        context, text = (
            tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for stop in (done, end)
        )
        if text.endswith("\ufffd") and end < len(ids):
            yield ""  # a character that is not complete yet
        else:
            yield text[len(context) :]
            start, done = done, end


def _visible(text: str) -> str:
    escaped = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escaped.replace("\n", "↵\n")


def _table(found: Audit, options: argparse.Namespace, checks: Sequence[str], colour: bool) -> Iterator[str]:
    rows, kept = found.rows, [row for row in found.rows if row.sides]
    left_out = {reason: errors for reason, errors in found.dropped.items() if errors}
    count = len(kept) + sum(map(len, left_out.values()))
    yield f"=== {options.data}: {count} rows read, {len(kept)} kept, {count - len(kept)} left out"
    if rows:
        lengths = np.array([row.length for row in rows])
        middle, high = np.percentile(lengths, [50, 95])
        yield f"tokens of a row: mean {lengths.mean():.1f}, p50 {middle:.0f}, p95 {high:.0f}, max {lengths.max()}"
        long = [row for row in rows if options.limit and row.length > options.limit]
        first = f"; first {long[0].where} with {long[0].length}" if long else ""
        limit = f"limit {options.limit}: {len(long)} of {len(rows)} rows longer" if options.limit else "no limit"
        yield limit + (f" ({len(long) / len(rows):.1%}), {options.truncate}{first}" if options.limit else "")
        sides = [side for row in kept for side in row.sides]
        trained, total = sum(int(side.mask.sum()) for side in sides), sum(side.length for side in sides)
        yield f"trained on: {trained} of {total} tokens"
    for check in checks:
        wrong = found.failed.get(check, [])
        word, tint = ("ok", GREEN) if not wrong else ("FAILED", RED) if check in FATAL else ("warning", YELLOW)
        yield _line(word, tint, check, len(wrong), wrong, colour)
    for reason, errors in sorted(left_out.items(), key=lambda entry: -len(entry[1])):
        yield _line("left out", YELLOW, reason, len(errors), errors, colour)


def _line(word: str, tint: str, name: str, count: int, details: Sequence[str], colour: bool) -> str:
    first = f"  first: {_visible(details[0])[:300]}" if details else ""
    return f"{tint if colour else ''}{word:8s}{OFF if colour else ''} {name:32s} {count:7d}{first}"


if __name__ == "__main__":
    sys.exit(main())
