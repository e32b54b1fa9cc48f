import json

import pytest

from alignax.data import BadRow, Row
from alignax.data.tools import read_calls, read_tools

ROW = Row("rows.jsonl:3", {})
BODY = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOL = {"type": "function", "function": BODY}

TOOLS = {
    "whole": ([TOOL], [TOOL]),
    "bare": ([BODY], [TOOL]),
    "without a type": ([{"function": BODY}], [TOOL]),
    "flat": ([{"type": "function", **BODY}], [TOOL]),
    "text": (json.dumps([BODY]), [TOOL]),
    "list of texts": ([json.dumps(TOOL)], [TOOL]),
    "no tools": ([], None),
    "no tools as text": ("[]", None),
    "empty text": (" ", None),
    "null": (None, None),
}


@pytest.mark.parametrize("value, expected", TOOLS.values(), ids=TOOLS)
def test_tools(value, expected):
    columns = {"tools": value, "id": 7}
    assert read_tools(ROW, columns) == expected
    assert columns == {"id": 7}


def test_no_column():
    assert read_tools(ROW, {}) is None


BAD_TOOLS = {
    "no JSON": ("a hammer", r"tools is not valid JSON \(.*\): 'a hammer'"),
    "an object": ({"add": BODY}, "tools must be a list of schemas, got dict"),
    "names": (["add"], r"tools\[0\] is not valid JSON"),
    "numbers": ([3], r"tools\[0\] must be an object with a name, got '3'"),
    "nameless": ([TOOL, {"type": "function", "function": {}}], r"tools\[1\] must be an object with a name"),
}


@pytest.mark.parametrize("value, message", BAD_TOOLS.values(), ids=BAD_TOOLS)
def test_bad_tools_are_named(value, message):
    with pytest.raises(BadRow, match=f"^rows.jsonl:3: wrong type: {message}"):
        read_tools(ROW, {"tools": value})


def call(name, arguments, **rest):
    return {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = {
    "whole": ([call("add", {"a": 1}, id="x1")], [call("add", {"a": 1}, id="x1")]),
    "arguments as text": ([call("add", '{"a": [1, "2"]}')], [call("add", {"a": [1, "2"]})]),
    "no arguments": ([{"name": "now"}], [call("now", {})]),
    "empty arguments": ([call("now", "{}")], [call("now", {})]),
    "one": ({"name": "add", "arguments": {"a": 1}}, [call("add", {"a": 1})]),
    "text": ('{"name": "add", "arguments": {"a": 1}}', [call("add", {"a": 1})]),
    "text of several": ('[{"name": "f"}, {"name": "g"}]', [call("f", {}), call("g", {})]),
}


@pytest.mark.parametrize("value, expected", CALLS.values(), ids=CALLS)
def test_calls(value, expected):
    assert read_calls(ROW, "call", value) == expected


BAD_CALLS = {
    "no JSON": ("add(1)", r"call is not valid JSON"),
    "nothing": ([], "call must hold calls of tools, got"),
    "nameless": ([{"arguments": {}}], r"call\[0\] must be an object with a name"),
    "arguments as a list": ([call("add", [1])], r"call\[0\] has arguments that are no object: '\[1\]'"),
    "arguments as a broken text": ([call("add", "{a: 1}")], r"call\[0\], its arguments, is not valid JSON"),
    "arguments as JSON of a number": ([call("add", "3")], r"call\[0\] has arguments that are no object: '3'"),
}


@pytest.mark.parametrize("value, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_are_named(value, message):
    with pytest.raises(BadRow, match=f"^rows.jsonl:3: wrong type: {message}"):
        read_calls(ROW, "call", value)
