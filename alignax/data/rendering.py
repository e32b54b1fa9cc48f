"""Messages as the text that the tokenizer's chat template makes of them, and as its ids.

A template is a program: it may refuse messages, leave some out, or write earlier ones differently once others follow.
What it refuses or leaves out is an error here; what it changes is found by `prefix`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from alignax.data.messages import Message, check_characters, shared_length
from alignax.data.rows import BadRow
from alignax.data.tools import Call, Tool


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every special token of a tokenizer, named (BOS, EOS) or not (`<|im_end|>`), by its id."""
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    reply: bool = False,
    template: str | None = None,
    where: str = "messages",
) -> str:
    """The messages as text; with `reply`, up to where the assistant's next message starts.

    Raises `BadRow` with the template's own words where it refuses the messages (a system's, say), and for half a
    surrogate pair.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=tools or None, chat_template=template, tokenize=False, add_generation_prompt=reply
        )
    except ImportError:  # jinja2 is missing: no fault of the row
        raise
    except Exception as error:  # a template is a program, and may fail in any way
        roles = [message["role"] for message in messages]
        raise BadRow(where, "template refused", f"messages of {roles}: {error}") from error
    check_characters(where, text)
    return text


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """The ids of a rendered text. Special tokens come from the template alone, and count."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def prefix(
    tokenizer: Any,
    ids: Sequence[int],
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None,
    where: str,
) -> int:
    """How many of a conversation's `ids` are the prompt for what follows `messages`; BadRow where they differ."""
    head = encode_rendered(tokenizer, render(tokenizer, messages, tools=tools, reply=True, where=where))
    if shared_length(head, ids) < len(head):
        raise differs(tokenizer, head, ids, len(messages), where)
    return len(head)


def differs(tokenizer: Any, head: Sequence[int], ids: Sequence[int], count: int, where: str, why: str = "") -> BadRow:
    """The error that names the first token in which the ids of the first `count` messages do not begin the whole's."""
    at = shared_length(head, ids)
    got, whole = (tokenizer.convert_ids_to_tokens(list(row[at : at + 1])) for row in (head, ids))
    detail = f"rendered up to message {count}, token {at} is {got}, but {whole} in the whole conversation"
    return BadRow(where, "template is no prefix", detail + why)


def check_spelled(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Tool] | None = None, where: str = "messages"
) -> None:
    """Raises `BadRow` where a message or a tool spells out a special token, which would be parsed as one."""
    special = special_tokens(tokenizer).values()
    said = {f"the {message['role']}'s message": message.values() for message in messages}
    for name, values in {**said, "the list of tools": tools or ()}.items():
        spelled = [token for token in special if any(token in str(value) for value in values)]
        if spelled:
            raise BadRow(where, "special token in a message", f"{name} contains {spelled}")


def check_kept(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None = None,
    where: str = "messages",
) -> None:
    """Raises `BadRow` where the template leaves out a tool, a call of one, what it answered or what a system says.

    Templates of models without tools do so without a word. The texts themselves may be written differently (trimmed,
    as JSON) or occur elsewhere, so each is replaced by a word that occurs nowhere and is looked for.
    """
    names: list[str] = []

    def word(name: str) -> str:
        names.append(name)
        return f"zqx{len(names)}xqz"

    probes = [_probe(message, f"message {i}", word) for i, message in enumerate(messages)]
    schemas = [{**tool, "function": _probe_body(tool["function"], "the tool", word)} for tool in tools or ()]
    if names:
        text = render(tokenizer, probes, tools=schemas, where=where)
        lost = [name for i, name in enumerate(names, start=1) if f"zqx{i}xqz" not in text]
        if lost:
            raise BadRow(where, "left out by the template", "; ".join(lost))
        if re.search(r"'zqx\d+xqz': '", text):
            detail = "the arguments of a call come out as Python, not JSON: the template has to write them with tojson"
            raise BadRow(where, "template refused", detail)


def _probe(message: Message, name: str, word: Callable[[str], str]) -> Message:
    calls, out = message.get("tool_calls") or [], dict(message)
    if message["role"] not in ("user", "assistant", "system") or (
        message.get("content") and (calls or message["role"] == "system")
    ):
        out["content"] = word(f"what the {message['role']} says in {name}")
    if calls:
        out["tool_calls"] = [
            {**call, "function": _probe_body(call["function"], f"{name}, the call of", word)} for call in calls
        ]
    return out


def _probe_body(function: Call, name: str, word: Callable[[str], str]) -> Call:
    out = {**function, "name": word(f"{name} {function['name']!r}")}
    if function.get("arguments"):
        key = word(f"{name} {function['name']!r} with its arguments")
        out["arguments"] = {key: key}
    return out
