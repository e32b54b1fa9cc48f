"""Messages as token ids through the tokenizer's chat template, and which of them are the assistant's own.

A template is a program: nothing says that the ids of a prompt begin those of the prompt and its answer. Training
would then be on other ids than sampling. So each turn's start is found by rendering the messages up to it and checking
that these ids are a prefix of the whole conversation's; where they are not, the row is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any

from alignax.data.masks import automatic
from alignax.data.messages import Message
from alignax.data.rendering import check_kept, check_spelled, encode_rendered, render
from alignax.data.rendering import special_tokens as special_tokens
from alignax.data.rows import BadRow
from alignax.data.tools import Tool

Masks = Callable[..., list[bool]]  # see `masks`


def encode(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    reply: bool = False,
    where: str = "messages",
) -> list[int]:
    """The ids of the rendered messages; with `reply`, up to where the assistant's next message starts.

    Special tokens come from the template alone. Raises `BadRow` where a message or a tool spells one out (in the text
    that would be parsed it could not be told from the template's), where the template refuses the messages, and where
    it leaves out a tool, a call, a tool's answer or a system's message.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template, or use rows of plain text")
    check_spelled(tokenizer, messages, tools=tools, where=where)
    text = render(tokenizer, messages, tools=tools, reply=reply, where=where)
    check_kept(tokenizer, messages, tools=tools, where=where)
    return encode_rendered(tokenizer, text)


def encode_turns(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    first: int = 0,
    tools: Sequence[Tool] | None = None,
    masks: Masks = automatic,
    where: str = "messages",
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the assistant said in messages `first` and later.

    Args:
      tokenizer: of transformers, with a chat template.
      messages: the whole conversation.
      first: the first message whose turn counts.
      tools: what the assistant may call; the template shows them.
      masks: `masks.by_markers`, `masks.by_prefix`, or `masks.automatic`, the first where the template has markers.
      where: names the row.

    Raises:
      BadRow: what `encode` refuses; a prompt, or a conversation cut after a turn, whose ids do not begin the whole's
        (named with the first token that differs); no turn to train on.
      ValueError: no chat template, or no markers where they are required.
    """
    ids = encode(tokenizer, messages, tools=tools, where=where)
    mask = masks(tokenizer, ids, messages, first=first, tools=tools, where=where)
    if not any(mask):
        raise BadRow(where, "no reply", "no message of the assistant to train on")
    return ids, mask
