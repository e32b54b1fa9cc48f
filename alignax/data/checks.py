"""What quietly ruins a training run, looked for in every row: a turn without its EOS, two BOS, a prompt that is not the
one sampled from, nothing to train on, special tokens that are spelled out in a text.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from alignax.data import chat, masks
from alignax.data.formats import Example, Pair, Prompt
from alignax.data.messages import shared_length
from alignax.data.rows import BadRow
from alignax.data.tokens import (
    Tokenizer,
    TokenRow,
    Truncate,
    encode_prompt,
    shorten,
    tokenize_example,
    tokenize_pair,
    tokenize_prompt,
)
from alignax.data.truncation import drop

EOS, BOS, PREFIX, MASK = "EOS trained", "no double BOS", "prompt an exact prefix", "no empty mask"
SPELLED = "no special token spelled out"
FATAL = (EOS, BOS, PREFIX, MASK)
# The library refuses these rows by itself. Who leaves bad rows out would not hear of it.
REFUSED = {"template is no prefix": PREFIX, "no reply": MASK, "nothing left": MASK}
UNLIMITED = 2**31 - 1


class Examined(NamedTuple):
    """A row as it is trained on or sampled from: one side, two of a pair, none where the limit leaves nothing."""

    where: str
    length: int  # tokens before anything is cut off
    sides: list[TokenRow]
    problems: list[tuple[str, str]]  # check and detail
    error: BadRow | None = None  # why it has no sides


class Audit(NamedTuple):
    """The rows of a data set; `where: detail` of each that fails a check; the errors of those left out, by reason."""

    rows: list[Examined]
    failed: dict[str, list[str]]
    dropped: dict[str, list[str]]

    @property
    def fatal(self) -> bool:
        """Whether training on these rows would go wrong, or there are none."""
        return not any(row.sides for row in self.rows) or any(self.failed.get(check) for check in FATAL)


def audit(
    tokenizer: Tokenizer,
    items: Iterable[Example | Pair | Prompt],
    *,
    eos_ids: Sequence[int],
    limit: int = UNLIMITED,
    truncate: Truncate = drop,
    every_turn: bool = False,
    masks: chat.Masks = masks.automatic,
    bad: Iterable[BadRow] = (),
) -> Audit:
    """Examines every row.

    Args:
      tokenizer: of the model to be trained.
      items: from `parse`.
      eos_ids: the tokens at which sampling stops.
      limit: the most tokens of a row. truncate, every_turn, masks: as for `tokenize_example`.
      bad: the errors of rows that `parse` left out.
    """
    rows: list[Examined] = []
    failed: dict[str, list[str]] = defaultdict(list)
    dropped: dict[str, list[str]] = defaultdict(list)

    def note(error: BadRow) -> None:
        dropped[error.reason].append(str(error))
        if error.reason in REFUSED:
            failed[REFUSED[error.reason]].append(str(error))

    for error in bad:  # never a row to train on, whatever the tokenizer
        dropped[error.reason].append(str(error))
    for item in items:
        try:
            row = _examine(tokenizer, item, frozenset(eos_ids), limit, truncate, every_turn, masks)
        except BadRow as error:
            note(error)
            continue
        rows.append(row)
        for check, details in row.problems:
            failed[check].append(f"{row.where}: {details}")
        if row.error:
            note(row.error)
    return Audit(rows, dict(failed), dict(dropped))


def _examine(
    tokenizer: Tokenizer,
    item: Example | Pair | Prompt,
    eos_ids: frozenset[int],
    limit: int,
    truncate: Truncate,
    every_turn: bool,
    masks: chat.Masks,
) -> Examined:
    prompt = encode_prompt(tokenizer, item.prompt, tools=item.tools, where=item.where)
    if isinstance(item, Example):
        sides = [tokenize_example(tokenizer, item, limit=UNLIMITED, every_turn=every_turn, masks=masks)]
    elif isinstance(item, Pair):
        sides = list(tokenize_pair(tokenizer, item, limit=UNLIMITED, masks=masks))
    else:
        tokens = tokenize_prompt(tokenizer, item, limit=UNLIMITED).tokens
        sides = [TokenRow(tokens, np.zeros(len(tokens), bool))]
    problems = [*_two_bos(tokenizer, sides[0]), *_spelled(tokenizer, item)]
    if not isinstance(item, Prompt):
        for side in sides:
            problems += [*_ends(tokenizer, side, eos_ids), *_starts(tokenizer, side, prompt, every_turn)]
    length, error = max(side.length for side in sides), None
    try:
        if isinstance(item, Prompt):
            cut = truncate(item.where, length, limit) if length > limit else slice(None)
            sides = [TokenRow(side.tokens[cut], side.mask[cut]) for side in sides]
        else:
            sides = shorten(item.where, sides, limit, truncate)
    except BadRow as refused:
        sides, error = [], refused
    return Examined(item.where, length, sides, list(dict(problems).items()), error)


def _two_bos(tokenizer: Tokenizer, row: TokenRow) -> Iterator[tuple[str, str]]:
    if row.tokens[:2].tolist() == [tokenizer.bos_token_id] * 2:
        yield BOS, f"it starts with {tokenizer.bos_token!r} twice"


def _spelled(tokenizer: Tokenizer, item: Example | Pair | Prompt) -> Iterator[tuple[str, str]]:
    # In messages they are refused. In a text they are characters; one that was rendered for another program has many.
    texts = [part for part in item[1:4] if isinstance(part, str)]
    found = [token for token in chat.special_tokens(tokenizer).values() if any(token in text for text in texts)]
    if found:
        yield SPELLED, f"its text contains {found}, which are split into characters"


def _ends(tokenizer: Tokenizer, row: TokenRow, eos_ids: frozenset[int]) -> Iterator[tuple[str, str]]:
    last = row.tokens[row.mask & ~np.append(row.mask[1:], False)].tolist()
    endless = [token for token in last if token not in eos_ids]
    if endless:
        got, wanted = (tokenizer.convert_ids_to_tokens(ids) for ids in (endless[:1], sorted(eos_ids)))
        yield EOS, f"a turn ends with {got}, and sampling with one of {wanted}"


def _starts(tokenizer: Tokenizer, row: TokenRow, prompt: Sequence[int], every_turn: bool) -> Iterator[tuple[str, str]]:
    at = shared_length(prompt, row.tokens.tolist())
    start = max(len(prompt), 1)
    if at < len(prompt):
        got, wanted = (tokenizer.convert_ids_to_tokens([int(ids[at])]) for ids in (row.tokens, prompt))
        yield PREFIX, f"token {at} is {got}, but {wanted} in the prompt"
    elif not row.mask[start] or (row.mask[:start].any() and not every_turn):
        yield PREFIX, f"the prompt has {start} tokens, and training starts at token {int(row.mask.argmax())}"
