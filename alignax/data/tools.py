"""Tools that an assistant may call, and its calls, as rows spell them, brought to what chat templates expect.

A tool is `{"type": "function", "function": {"name": ..., "parameters": ...}}`, and a call `{"type": "function",
"function": {"name": ..., "arguments": {...}}}`, with its `id` where it has one. Arguments written as JSON in a text
(OpenAI's way) become the object that they spell: templates print them with `tojson`, which would quote the text again.
"""

import json
from typing import Any

from alignax.data.rows import BadRow, Row

Tool = dict[str, Any]
Call = dict[str, Any]


def read_tools(row: Row, columns: dict[str, Any]) -> list[Tool] | None:
    """The tools in the `tools` column, which is taken out of `columns`; None where there is none or it is empty.

    The column is a list of JSON schemas, or JSON of one in a text (ShareGPT, LLaMA-Factory); a schema may be bare
    (`{"name": ..., "parameters": ...}`). Raises `BadRow` for anything else; a column that merely has this name can be
    renamed.
    """
    value = columns.pop("tools", None)
    listed = _loaded(row, "tools", value.strip() or "[]") if isinstance(value, str) else value
    if not listed:
        return None
    if not isinstance(listed, list):
        raise BadRow(row.where, "wrong type", f"tools must be a list of schemas, got {type(listed).__name__}")
    return [_schema(row, f"tools[{i}]", tool) for i, tool in enumerate(listed)]


def read_calls(row: Row, name: str, value: Any) -> list[Call]:
    """A message's `tool_calls`, or the value of a ShareGPT `function_call`: one call or a list, or JSON of these."""
    listed = _loaded(row, name, value) if isinstance(value, str) else value
    listed = [listed] if isinstance(listed, dict) else listed
    if not isinstance(listed, list) or not listed:
        raise BadRow(row.where, "wrong type", f"{name} must hold calls of tools, got {str(value)[:80]!r}")
    return [_call(row, f"{name}[{i}]", call) for i, call in enumerate(listed)]


def _schema(row: Row, name: str, tool: Any) -> Tool:
    tool = _loaded(row, name, tool) if isinstance(tool, str) else tool
    body = _named(row, name, tool)
    if body is tool:
        body = {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
        return {"type": "function", "function": body}
    return {"type": "function", **tool}


def _call(row: Row, name: str, call: Any) -> Call:
    body = _named(row, name, call)
    arguments = body.get("arguments")
    arguments = _loaded(row, f"{name}, its arguments,", arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments or {}, dict):
        raise BadRow(row.where, "wrong type", f"{name} has arguments that are no object: {str(arguments)[:80]!r}")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    return {**rest, "type": "function", "function": {"name": body["name"], "arguments": arguments or {}}}


def _named(row: Row, name: str, value: Any) -> dict[str, Any]:
    # What has the name: the function inside, or the whole.
    body = value.get("function") or value if isinstance(value, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str) or not body["name"]:
        raise BadRow(row.where, "wrong type", f"{name} must be an object with a name, got {str(value)[:80]!r}")
    return body


def _loaded(row: Row, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(row.where, "wrong type", f"{name} is not valid JSON ({error}): {text[:80]!r}") from error
