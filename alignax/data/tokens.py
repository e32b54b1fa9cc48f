"""Rows as token ids: one prompt, its completions, and the mask of what is trained on.

A prompt has the same ids here as when it is sampled from: BOS where the tokenizer itself puts one, then the text. A
completion continues exactly these ids. Texts are never searched for special tokens: a literal `</s>` in a text is five
characters, not the end of the row; in messages, where the template's special tokens must count, it is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignax.data import chat, masks
from alignax.data.formats import Example, Pair, Prompt
from alignax.data.messages import Content, check_characters
from alignax.data.rows import BadRow
from alignax.data.tools import Tool
from alignax.data.truncation import refuse

Tokenizer = Any  # a transformers.PreTrainedTokenizerFast
Truncate = Callable[[str, int, int], slice]


class TokenRow(NamedTuple):
    """A training row: ids and, of the same length, whether to train on each."""

    tokens: np.ndarray  # int32 [T]
    mask: np.ndarray  # bool [T]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


class TokenPair(NamedTuple):
    """Two training rows with one prompt."""

    chosen: TokenRow
    rejected: TokenRow

    @property
    def length(self) -> int:
        """The number of tokens of the longer side."""
        return max(self.chosen.length, self.rejected.length)


class TokenLabelled(NamedTuple):
    """A training row whose completion was said to be good or bad."""

    row: TokenRow
    desirable: bool

    @property
    def length(self) -> int:
        """The number of tokens."""
        return self.row.length


class TokenPrompt(NamedTuple):
    """A prompt's ids, the prompt itself and what else the reward is given."""

    tokens: np.ndarray  # int32 [P]
    prompt: Content
    columns: dict[str, Any]

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, no special token among them: neither added nor parsed."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def encode_prompt(
    tokenizer: Tokenizer, prompt: Content, *, tools: Sequence[Tool] | None = None, where: str = "prompt"
) -> list[int]:
    """The ids to sample from: BOS, if the tokenizer adds one, and the text; or the messages, up to the reply."""
    if not isinstance(prompt, str):
        return chat.encode(tokenizer, prompt, tools=tools, reply=True, where=where)
    check_characters(where, prompt)
    return _bos(tokenizer) + encode_text(tokenizer, prompt)


def encode_texts(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """The ids of a prompt, as `encode_prompt` has them, and those of the completion that follows it.

    Where the ids of the prompt begin those of the two together, the completion's are the rest of these (as in TRL).
    Where a token would span the border (`"2 + 2 ="`, `"= 4"`), they are the completion's own, as it would follow a
    line end or a letter: the prompt keeps the ids it is sampled from, and no space comes in (SentencePiece adds one).
    """
    head = encode_text(tokenizer, prompt)
    rest = _after(head, encode_text(tokenizer, prompt + completion))
    anchors = iter("a\n" if completion[:1].isspace() else "\na")
    while rest is None and (anchor := next(anchors, None)):
        rest = _after(encode_text(tokenizer, anchor), encode_text(tokenizer, anchor + completion))
    return _bos(tokenizer) + head, encode_text(tokenizer, completion) if rest is None else rest


def _bos(tokenizer: Tokenizer) -> list[int]:
    # Not what is added to the empty text: with some tokenizers that is an EOS, and EOS may be BOS.
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _after(head: list[int], whole: list[int]) -> list[int] | None:
    return whole[len(head) :] if whole[: len(head)] == head else None


def tokenize_example(
    tokenizer: Tokenizer,
    example: Example,
    *,
    limit: int,
    truncate: Truncate = refuse,
    eos: bool = True,
    every_turn: bool = False,
    masks: chat.Masks = masks.automatic,
) -> TokenRow:
    """The training row of an example, at most `limit` tokens.

    Args:
      tokenizer: of transformers; messages need its chat template.
      example: from `parse`.
      limit: the most tokens a row may have.
      truncate: one of `truncation`, applied to longer rows.
      eos: whether rows end with the tokenizer's EOS, trained on; a template that closes the turn itself, with EOS or
        another special token, is left as it is.
      every_turn: for messages, whether the assistant's messages in the prompt are trained on too.
      masks: for messages, how its turns are found: one of `alignax.data.masks`.

    Raises:
      BadRow: too long, nothing left to train on, half a surrogate pair, or what `chat.encode_turns` refuses.
    """
    row = _whole(tokenizer, example, example.completion, eos=eos, every_turn=every_turn, masks=masks)
    (row,) = shorten(example.where, [row], limit, truncate)
    return row


def tokenize_pair(
    tokenizer: Tokenizer,
    pair: Pair,
    *,
    limit: int,
    truncate: Truncate = refuse,
    eos: bool = True,
    masks: chat.Masks = masks.automatic,
) -> TokenPair:
    """The two training rows of a pair, at most `limit` tokens each; arguments and errors of `tokenize_example`."""
    sides = [_whole(tokenizer, pair, side, eos=eos, masks=masks) for side in (pair.chosen, pair.rejected)]
    if np.array_equal(sides[0].tokens, sides[1].tokens):
        raise BadRow(pair.where, "chosen equals rejected", "their tokens are the same")
    chosen, rejected = shorten(pair.where, sides, limit, truncate)
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise BadRow(pair.where, "nothing left", f"chosen and rejected are equal once cut to {limit} tokens")
    return TokenPair(chosen, rejected)


def tokenize_labelled(tokenizer: Tokenizer, example: Example, *, label: str = "label", **options: Any) -> TokenLabelled:
    """The training row of an example with the label in its column `label`: true or false, 1 or 0.

    Arguments and errors of `tokenize_example`, and BadRow for an example without such a label.
    """
    if label not in example.columns:
        raise BadRow(example.where, "no label", f"found the columns {sorted(example.columns)}, expected {label!r}")
    value = example.columns[label]
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise BadRow(example.where, "wrong label", f"{value!r} in {label!r}; expected true or false")
    return TokenLabelled(tokenize_example(tokenizer, example, **options), bool(value))


def tokenize_prompt(tokenizer: Tokenizer, prompt: Prompt, *, limit: int, truncate: Truncate = refuse) -> TokenPrompt:
    """The ids of a prompt, at most `limit`; arguments and errors of `tokenize_example`."""
    ids = encode_prompt(tokenizer, prompt.prompt, tools=prompt.tools, where=prompt.where)
    if len(ids) > limit:
        ids = ids[truncate(prompt.where, len(ids), limit)]
    if not ids:
        raise BadRow(prompt.where, "empty prompt", "it has no tokens")
    return TokenPrompt(np.array(ids, np.int32), prompt.prompt, prompt.columns)


def _whole(
    tokenizer: Tokenizer,
    row: Example | Pair,
    completion: Content,
    *,
    eos: bool,
    masks: chat.Masks,
    every_turn: bool = False,
) -> TokenRow:
    where, prompt = row.where, row.prompt
    if isinstance(prompt, str) and isinstance(completion, str):
        check_characters(where, prompt + completion)
        head, rest = encode_texts(tokenizer, prompt, completion)
        ids, mask = head + rest, [False] * len(head) + [True] * len(rest)
    elif isinstance(prompt, list) and isinstance(completion, list):
        ids, mask = chat.encode_turns(
            tokenizer,
            prompt + completion,
            first=0 if every_turn else len(prompt),
            tools=row.tools,
            masks=masks,
            where=where,
        )
    else:
        raise TypeError(f"{where}: prompt and completion must both be texts or both be messages")
    trained = [i for i, on in zip(ids, mask) if on]
    if eos and not (trained and trained[-1] in chat.special_tokens(tokenizer)):
        if tokenizer.eos_token_id is None:
            raise ValueError("eos=True, but the tokenizer has no eos_token; set one, or pass eos=False")
        ids, mask = ids + [tokenizer.eos_token_id], mask + [True]
    return TokenRow(np.array(ids, np.int32), np.array(mask, bool))


def shorten(where: str, rows: list[TokenRow], limit: int, truncate: Truncate) -> list[TokenRow]:
    """The rows of one prompt with at most `limit` tokens each; BadRow where nothing is left to train on."""
    longest = max(row.length for row in rows)
    kept = truncate(where, longest, limit) if longest > limit else slice(0, longest)
    # The first token is predicted from nothing; and what a pair shares is its prompt, which must not be cut away.
    prompt = min(int(np.argmax(row.mask)) for row in rows)
    start = kept.indices(longest)[0]
    if len(rows) > 1 and start >= prompt:
        raise BadRow(where, "nothing left", f"of {limit} tokens none is the prompt's beside the longer completion")
    rows = [TokenRow(row.tokens[kept], row.mask[kept] & (np.arange(row.length)[kept] > start)) for row in rows]
    if not all(row.mask.any() for row in rows):
        raise BadRow(where, "nothing left", f"no token to train on among the {limit} kept of {longest}")
    return rows


def same_vocabulary(first: Tokenizer, second: Tokenizer) -> None:
    """Raises ValueError, with the first token that differs and both sizes, unless all ids mean the same in both.

    A model scores the ids of another (a reward model its policy's) only where this holds.
    """
    one, other = ({i: token for token, i in tokenizer.get_vocab().items()} for tokenizer in (first, second))
    at = next((i for i in sorted(one.keys() | other.keys()) if one.get(i) != other.get(i)), None)
    if at is not None:
        got, wanted = (repr(side[at]) if at in side else "absent" for side in (one, other))
        raise ValueError(
            f"the vocabularies differ: token {at} is {got} in the first, of {len(one)} tokens, and {wanted} in the "
            f"second, of {len(other)}"
        )
