"""Which tokens of a conversation the assistant said, two ways: by the template's markers, or by comparing prefixes.

Both train on the same tokens of a turn: from the end of the prompt that asks for it to the special token that ends it,
which the policy has to choose; the white space that a template writes after that token is nobody's. In a template
without such a token a turn runs to its end. What the user, the system or a tool says is never trained on.

A function here takes `(tokenizer, ids, messages, *, first, tools, where)`, `ids` being those of the whole conversation,
and returns one bool for each, true in the assistant's turns among messages `first` and later. An opening message of the
assistant answers nothing and is left out.
"""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from alignax.data.messages import Message, shared_length
from alignax.data.rendering import differs, encode_rendered, prefix, render, special_tokens
from alignax.data.rows import BadRow
from alignax.data.tools import Tool

# Noncharacters, which Unicode keeps for such use within a program.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"(\{%[-+]?\s*generation\s*([-+]?)%\})")
_ENDGENERATION = re.compile(r"\{%([-+]?)(\s*endgeneration\s*[-+]?%\})")


def automatic(
    tokenizer: Any,
    ids: Sequence[int],
    messages: Sequence[Message],
    *,
    first: int = 0,
    tools: Sequence[Tool] | None = None,
    where: str = "messages",
) -> list[bool]:
    """`by_markers` where the template has them, else `by_prefix`."""
    way = by_markers if has_markers(tokenizer, tools) else by_prefix
    return way(tokenizer, ids, messages, first=first, tools=tools, where=where)


def has_markers(tokenizer: Any, tools: Sequence[Tool] | None = None) -> bool:
    """Whether the chat template marks what the assistant says by `{% generation %}` blocks."""
    return bool(_GENERATION.search(tokenizer.get_chat_template(tools=tools)))


def by_prefix(
    tokenizer: Any,
    ids: Sequence[int],
    messages: Sequence[Message],
    *,
    first: int = 0,
    tools: Sequence[Tool] | None = None,
    where: str = "messages",
) -> list[bool]:
    """The turns found by rendering the messages up to each one's start and up to its end, for any template.

    Raises `BadRow` where these ids do not begin the whole conversation's: a template that writes earlier turns
    differently once others follow (as many do that take thoughts out of them), or whose prompts are not what stands
    before the answer.
    """
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if i >= max(first, 1) and message["role"] == "assistant":
            start = prefix(tokenizer, ids, messages[:i], tools=tools, where=where)
            end = _end(tokenizer, ids, messages, i, start, tools, where)
            mask[start:end] = [True] * (end - start)
    return mask


def by_markers(
    tokenizer: Any,
    ids: Sequence[int],
    messages: Sequence[Message],
    *,
    first: int = 0,
    tools: Sequence[Tool] | None = None,
    where: str = "messages",
) -> list[bool]:
    """The `{% generation %}` blocks of the template, each with the special token behind it that ends the turn.

    The characters of a block are found by printing a noncharacter at its borders, and its tokens by the offsets of a
    fast tokenizer. (transformers' `return_assistant_tokens_mask` misplaces blocks within a macro, and stops at the
    first of the tokens that make up a block's last character.) Templates may write earlier turns differently; only the
    prompts of the first and the last turn trained on have to be prefixes.

    Raises:
      ValueError: the template has no such blocks, or the tokenizer no offsets.
      BadRow: a prompt that is no prefix; a token that begins before a block and ends in it, which cannot be sampled.
    """
    if not has_markers(tokenizer, tools):
        raise ValueError(
            "the chat template has no {% generation %} markers: put them around what the assistant says, or find its "
            "turns by masks.by_prefix"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"markers need the offsets of a fast tokenizer, got {type(tokenizer).__name__}")
    mask, special = [False] * len(ids), special_tokens(tokenizer)
    asked = [i for i, message in enumerate(messages) if i >= max(first, 1) and message["role"] == "assistant"]
    if not asked:
        return mask
    for start, end in _blocks(tokenizer, ids, messages, tools, where):
        end = _closed(tokenizer, ids, start, end, special)
        end += ids[end - 1] not in special and end < len(ids) and ids[end] in special
        mask[start:end] = [True] * (end - start)
    prompt = prefix(tokenizer, ids, messages[: asked[-1]], tools=tools, where=where)
    bare = encode_rendered(tokenizer, render(tokenizer, messages[: asked[-1]], tools=tools, where=where))
    _unmask(mask, ids, ids[shared_length(bare, ids) : prompt], special)
    if first or messages[0]["role"] == "assistant":
        before = prefix(tokenizer, ids, messages[: asked[0]], tools=tools, where=where)
        mask[:before] = [False] * before
    return mask


def _unmask(mask: list[bool], ids: Sequence[int], header: Sequence[int], special: dict[int, str]) -> None:
    # Some blocks take in what asks for the answer, which is in the prompt and never sampled. Messages cannot spell it.
    if any(i in special for i in header):
        for t in range(len(ids) - len(header) + 1):
            if ids[t : t + len(header)] == header:
                mask[t : t + len(header)] = [False] * len(header)


def _end(
    tokenizer: Any,
    ids: Sequence[int],
    messages: Sequence[Message],
    i: int,
    start: int,
    tools: Sequence[Tool] | None,
    where: str,
) -> int:
    special = special_tokens(tokenizer)
    if i == len(messages) - 1:
        return _closed(tokenizer, ids, start, len(ids), special)
    head = encode_rendered(tokenizer, render(tokenizer, messages[: i + 1], tools=tools, where=where))
    shared = shared_length(head, ids)
    end = _closed(tokenizer, ids, start, shared, special)
    # A conversation may end with a token of its own behind the last turn's, as Phi 3's does.
    closed = end > start and ids[end - 1] in special and _blank(tokenizer, head[shared:], special)
    if shared < len(head) and not closed:
        why = (
            f"; the template changes message {i} once others follow it: train on the last turn alone, or mark the turns"
        )
        raise differs(tokenizer, head, ids, i + 1, where, why)
    return end


def _closed(tokenizer: Any, ids: Sequence[int], start: int, end: int, special: dict[int, str]) -> int:
    # Up to the last special token, if nothing but white space comes after it.
    last = next((t for t in reversed(range(start, end)) if ids[t] in special), None)
    return end if last is None or not _blank(tokenizer, ids[last + 1 : end], special) else last + 1


def _blank(tokenizer: Any, ids: Sequence[int], special: dict[int, str]) -> bool:
    return not tokenizer.decode([i for i in ids if i not in special]).strip()


def _blocks(
    tokenizer: Any, ids: Sequence[int], messages: Sequence[Message], tools: Sequence[Tool] | None, where: str
) -> list[tuple[int, int]]:
    # The tokens of each block, first and one past the last; blocks that touch are one.
    template = tokenizer.get_chat_template(tools=tools)
    template = _GENERATION.sub(rf"\1{{% print '{OPEN}' \2%}}", template)
    template = _ENDGENERATION.sub(rf"{{%\1 print '{CLOSE}' %}}{{%\2", template)
    pieces = re.split(f"[{OPEN}{CLOSE}]", render(tokenizer, messages, tools=tools, template=template, where=where))
    encoded = tokenizer(
        "".join(pieces),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    if encoded.input_ids != list(ids):
        raise BadRow(
            where, "template refused", f"its markers move its text, or a message contains {OPEN!r} or {CLOSE!r}"
        )
    borders = list(accumulate(len(piece) for piece in pieces))
    blocks: list[tuple[int, int]] = []
    for begin, end in zip(borders[0::2], borders[1::2]):
        if blocks and blocks[-1][1] == begin:
            begin = blocks.pop()[0]
        blocks.append((begin, end))
    found = [_tokens(encoded.offset_mapping, begin, end, where) for begin, end in blocks]
    return [(tokens[0], tokens[-1] + 1) for tokens in found if tokens]


def _tokens(offsets: Sequence[tuple[int, int]], begin: int, end: int, where: str) -> list[int]:
    # A token reaches back to the end of the one before: offsets may leave out the space that it begins with.
    reach = [min(own, before) for (own, _), (_, before) in zip(offsets, [(0, 0), *offsets])]
    inside = [t for t, (_, after) in enumerate(offsets) if begin < after and reach[t] < end]
    if inside and offsets[inside[0]][0] < begin:
        detail = f"token {inside[0]} begins before what the assistant says, and ends in it"
        raise BadRow(where, "template is no prefix", detail)
    return inside
