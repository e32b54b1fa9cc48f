"""Messages as token ids through the tokenizer's chat template, and which of them are the assistant's own.

A template is a program: nothing says that the ids of a prompt begin those of the prompt and its answer. Training
would then be on other ids than sampling. So each turn's start and end are found by rendering the messages up to it and
checking that these ids are a prefix of the whole conversation's; where they are not, the row is refused.
"""

import re
from collections.abc import Sequence
from typing import Any

from alignax.data.messages import Message, shared_length
from alignax.data.rows import BadRow


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token of a tokenizer, named (BOS, EOS) or not (`<|im_end|>`), by its id."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode(tokenizer: Any, messages: Sequence[Message], *, reply: bool = False, where: str = "messages") -> list[int]:
    """The ids of the rendered messages; with `reply`, up to where the assistant's next message starts.

    Special tokens come from the template alone. Raises `BadRow` where a message spells one out (in the text that would
    be parsed it could not be told from the template's), and where the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: set tokenizer.chat_template, or use rows of plain text")
    special = special_tokens(tokenizer).values()
    for message in messages:
        said = "\n".join(str(value) for value in message.values())
        spelled = [token for token in special if token in said]
        if spelled:
            raise BadRow(where, "special token in a message", f"the {message['role']}'s message contains {spelled}")
    return _render(tokenizer, messages, reply, where)


def _render(tokenizer: Any, messages: Sequence[Message], reply: bool, where: str) -> list[int]:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=reply)
    except ImportError:  # jinja2 is missing: no fault of the row
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        roles = [message["role"] for message in messages]
        raise BadRow(where, "template refused", f"messages of {roles}: {error}") from error
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def encode_turns(
    tokenizer: Any, messages: Sequence[Message], *, first: int = 0, where: str = "messages"
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them the assistant said in messages `first` and later.

    A turn runs from the end of the prompt that asks for it to the special token that ends it; what a template writes
    after that (a line end) is not the assistant's. Without such a token it runs to the end of the message. In a
    template with `{% generation %}` blocks these are the turns, and only the prompt before message `first` is checked.

    Raises:
      BadRow: what `encode` refuses; a prompt, or a conversation cut after a turn, whose ids do not begin the whole's
        (named with the first token that differs); no turn to train on.
    """
    ids = encode(tokenizer, messages, where=where)
    if re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()):
        mask = _marked(tokenizer, messages)
        start = _prefix(tokenizer, ids, messages[:first], reply=True, where=where) if first else 0
        mask = [False] * start + mask[start:]
    else:
        mask = [False] * len(ids)
        for i, message in enumerate(messages):
            if i >= first and message["role"] == "assistant":
                start, end = _turn(tokenizer, ids, messages, i, where)
                mask[start:end] = [True] * (end - start)
    if not any(mask):
        raise BadRow(where, "no reply", "no message of the assistant to train on")
    return ids, mask


def _marked(tokenizer: Any, messages: Sequence[Message]) -> list[bool]:
    out = tokenizer.apply_chat_template(list(messages), return_dict=True, return_assistant_tokens_mask=True)
    marked, special = [bool(on) for on in out["assistant_masks"]], special_tokens(tokenizer)
    # A block may leave out the special token that ends the turn. The policy has to choose it all the same.
    ends = [
        after and not on and token in special for after, on, token in zip([False, *marked], marked, out["input_ids"])
    ]
    return [on or end for on, end in zip(marked, ends)]


def _turn(tokenizer: Any, ids: list[int], messages: Sequence[Message], i: int, where: str) -> tuple[int, int]:
    start = _prefix(tokenizer, ids, messages[:i], reply=True, where=where)
    last = i == len(messages) - 1
    end = len(ids) if last else _prefix(tokenizer, ids, messages[: i + 1], reply=False, where=where)
    special = special_tokens(tokenizer)
    closing = [t for t in range(start, end) if ids[t] in special]
    return start, closing[-1] + 1 if closing else end


def _prefix(tokenizer: Any, ids: list[int], messages: Sequence[Message], *, reply: bool, where: str) -> int:
    head = _render(tokenizer, messages, reply, where)
    at = shared_length(head, ids)
    if at < len(head):
        got, whole = (tokenizer.convert_ids_to_tokens(row[at : at + 1]) for row in (head, ids))
        raise BadRow(
            where,
            "template is no prefix",
            f"rendered up to message {len(messages)}, token {at} is {got}, but {whole} in the whole conversation",
        )
    return len(head)
