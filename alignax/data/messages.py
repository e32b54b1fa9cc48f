"""Texts and messages as rows hold them, brought to one shape: a text, or `[{"role": ..., "content": ...}, ...]`.

Reads OpenAI's `role`/`content`, ShareGPT's `from`/`value`, and contents given as parts. Calls of tools become what
`tools` says, ShareGPT's `function_call` too; a tool's answer gets the `name` of the call it answers. Other keys of a
message stay, since chat templates may use them.
"""

from collections.abc import Sequence
from typing import Any

from alignax.data.rows import BadRow, Row
from alignax.data.tools import read_calls

Message = dict[str, Any]
Content = str | list[Message]

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def shared_length(left: Sequence, right: Sequence) -> int:
    """How many leading entries two sequences have in common."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))


def said(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


def read_text(row: Row, name: str, value: Any) -> str:
    """`value`, refused unless it is a text with something in it."""
    if not isinstance(value, str):
        raise BadRow(row.where, "wrong type", f"{name} must be a text, got {type(value).__name__}")
    if not value.strip():
        raise BadRow(row.where, f"empty {name}")
    return value


def read_messages(row: Row, name: str, value: Any) -> list[Message]:
    """A list of messages, or a single one, in one shape; none of them empty but a system's and a tool's."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise BadRow(row.where, "wrong type", f"{name} must be a list of messages, got {type(value).__name__}")
    if not listed:
        raise BadRow(row.where, f"empty {name}")
    return _with_names([_message(row, f"{name}[{i}]", message) for i, message in enumerate(listed)])


def read_content(row: Row, name: str, value: Any) -> Content:
    """A text or messages, whichever `value` is."""
    return read_messages(row, name, value) if isinstance(value, list | dict) else read_text(row, name, value)


def check_characters(where: str, text: str) -> None:
    """Raises `BadRow` for half a surrogate pair, which JSON can spell and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"character {error.start} is {text[error.start]!r}, after {text[: error.start][-20:]!r}"
        raise BadRow(where, "unpaired surrogate", detail) from error


def _message(row: Row, name: str, message: Message) -> Message:
    rest = dict(message)
    if "from" in message and "value" in message:
        speaker, content = rest.pop("from"), rest.pop("value")
        if speaker not in SHAREGPT_ROLES:
            raise BadRow(row.where, "unknown role", f"{name} is from {speaker!r}; known are {list(SHAREGPT_ROLES)}")
    elif "role" in message and ("content" in message or message.get("tool_calls")):
        speaker, content = rest.pop("role"), rest.pop("content", None)
    else:
        raise BadRow(row.where, "missing field", f"{name} needs role and content, found {sorted(message)}")
    calls = rest.pop("tool_calls", None)
    if speaker == "function_call":
        calls, content = content, None
    role = SHAREGPT_ROLES.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if isinstance(content, list):
        content = "".join(_part(row, name, part) for part in content)
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(row.where, "wrong type", f"role and content of {name} must be texts, got {role!r}, {content!r}")
    if not content.strip() and role not in ("system", "tool") and not calls:
        raise BadRow(row.where, "empty message", f"{name}, the {role}'s")
    made = {"role": role, "content": content, **rest}
    return {**made, "tool_calls": read_calls(row, f"{name}, its call,", calls)} if calls else made


def _part(row: Row, name: str, part: Any) -> str:
    # {"type": "text", "text": ...}; LLaMA-Factory says "value".
    fields = part if isinstance(part, dict) else {}
    value = fields.get("text", fields.get("value"))
    if fields.get("type", "text") != "text" or not isinstance(value, str):
        raise BadRow(row.where, "wrong type", f"{name} has a part that is no text: {str(part)[:80]}")
    return value


def _with_names(talk: list[Message]) -> list[Message]:
    # Some templates print a tool's name beside its answer; rows often give only the id of the call, or nothing.
    calls: list[Message] = []
    for message in talk:
        calls = message.get("tool_calls", calls)
        if message["role"] == "tool" and not message.get("name"):
            asked = message.get("tool_call_id")
            fits = [call["function"]["name"] for call in calls if asked is None or call.get("id") == asked]
            if len(fits) == 1:
                message["name"] = fits[0]
    return talk
