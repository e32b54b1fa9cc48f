"""Texts and messages as rows hold them, brought to one shape: a text, or `[{"role": ..., "content": ...}, ...]`.

Reads OpenAI's `role`/`content`, ShareGPT's `from`/`value`, and contents given as parts. Other keys of a message (tool
calls, names) stay, since chat templates may use them.
"""

from collections.abc import Sequence
from typing import Any

from alignax.data.rows import BadRow, Row

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
    """A list of messages, or a single one, in one shape; none of them empty."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise BadRow(row.where, "wrong type", f"{name} must be a list of messages, got {type(value).__name__}")
    if not listed:
        raise BadRow(row.where, f"empty {name}")
    return [_message(row, f"{name}[{i}]", message) for i, message in enumerate(listed)]


def read_content(row: Row, name: str, value: Any) -> Content:
    """A text or messages, whichever `value` is."""
    return read_messages(row, name, value) if isinstance(value, list | dict) else read_text(row, name, value)


def _message(row: Row, name: str, message: Message) -> Message:
    rest = dict(message)
    if "from" in message and "value" in message:
        speaker, content = rest.pop("from"), rest.pop("value")
        if speaker not in SHAREGPT_ROLES:
            raise BadRow(row.where, "unknown role", f"{name} is from {speaker!r}; known are {list(SHAREGPT_ROLES)}")
        role = SHAREGPT_ROLES[speaker]
    elif "role" in message and "content" in message:
        role, content = rest.pop("role"), rest.pop("content")
    else:
        raise BadRow(row.where, "missing field", f"{name} needs role and content, found {sorted(message)}")
    if isinstance(content, list):
        content = "".join(_part(row, name, part) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadRow(row.where, "wrong type", f"role and content of {name} must be texts, got {role!r}, {content!r}")
    if not content.strip() and role != "system" and not message.get("tool_calls"):
        raise BadRow(row.where, "empty message", f"{name}, the {role}'s")
    return {"role": role, "content": content, **rest}


def _part(row: Row, name: str, part: Any) -> str:
    # {"type": "text", "text": ...}; LLaMA-Factory says "value".
    fields = part if isinstance(part, dict) else {}
    value = fields.get("text", fields.get("value"))
    if fields.get("type", "text") != "text" or not isinstance(value, str):
        raise BadRow(row.where, "wrong type", f"{name} has a part that is no text: {str(part)[:80]}")
    return value
