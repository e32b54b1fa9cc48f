import copy

import pytest

from alignax.data import BadRow, chat
from alignax.data.rendering import render

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}


def said(role, content, **rest):
    return {"role": role, "content": content, **rest}


def loop(*, answer='{"sum": 3}', thought=""):
    """A question, the call of a tool, what it answered, and the reply."""
    return [
        said("user", "1+2?"),
        said("assistant", thought, tool_calls=[CALL]),
        said("tool", answer, name="add"),
        said("assistant", "3"),
    ]


RENDERED = {
    "chatml": (
        "<|im_start|>system\nTools:\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}<|im_end|>\n'
        "<|im_start|>user\n1+2?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sum": 3}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n3<|im_end|>\n"
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}\n1+2?<|eot_id|>'
        '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "add", "parameters": {"a": 1, "b": [2]}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"sum\\": 3}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n3<|eot_id|>"
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_tools_are_rendered(family, name):
    tokenizer = family(name)
    ids = chat.encode(tokenizer, loop(), tools=[ADD])
    assert tokenizer.decode(ids) == RENDERED[name]
    start = chat.encode(tokenizer, loop()[:3], tools=[ADD], reply=True)
    assert ids[: len(start)] == start


REFUSED = {
    "system, Gemma": ("gemma", [said("system", "be brief"), said("user", "hi")], None, "System role not supported"),
    "system, Mistral": ("mistral", [said("system", "be brief"), said("user", "hi")], None, "roles must alternate"),
    "tool, Mistral": ("mistral", loop()[:3], None, r"'tool'\]: .*must alternate"),
    "two calls, Llama": ("llama3", [said("user", "?"), said("assistant", "", tool_calls=[CALL] * 2)], None, "single"),
}


@pytest.mark.parametrize("name, messages, tools, message", REFUSED.values(), ids=REFUSED)
def test_refusals_of_the_template_name_the_row_and_its_words(family, name, messages, tools, message):
    with pytest.raises(BadRow, match=f"^file:9: template refused: messages of .*{message}"):
        chat.encode(family(name), messages, tools=tools, where="file:9")


LOST = {
    "tools": ("gemma", [said("user", "hi")], [ADD], "the tool 'add'"),
    "calls": ("gemma", loop(), None, "message 1, the call of 'add'; message 1, the call of 'add' with its arguments"),
    "answers": ("phi3", [said("user", "hi"), said("tool", "hi")], None, "what the tool says in message 1"),
    "empty answers": ("phi3", [said("user", "hi"), said("tool", "")], None, "what the tool says in message 1"),
    "system": ("phi3", [said("system", "hi"), said("user", "hi")], None, "what the system says in message 0"),
    "thoughts beside a call": ("llama3", loop(thought="hm"), [ADD], "what the assistant says in message 1"),
}


@pytest.mark.parametrize("name, messages, tools, message", LOST.values(), ids=LOST)
def test_what_the_template_leaves_out_is_named(family, name, messages, tools, message):
    """Also where the same words stand elsewhere in the text."""
    with pytest.raises(BadRow, match=f"^file:9: left out by the template: {message}$"):
        chat.encode(family(name), messages, tools=tools, where="file:9")


def test_an_empty_system_message_is_no_loss(family):
    chat.encode(family("phi3"), [said("system", ""), said("user", "hi")])


def test_arguments_that_come_out_as_python(family):
    careless = copy.deepcopy(family("chatml"))
    careless.chat_template = careless.chat_template.replace(
        "call.function.arguments | tojson", "call.function.arguments | string"
    )
    with pytest.raises(
        BadRow, match=r"^file:9: template refused: the arguments of a call come out as Python, not JSON"
    ):
        chat.encode(careless, loop(), tools=[ADD], where="file:9")


@pytest.mark.parametrize(
    "messages, tools, name",
    [
        (
            [said("user", "hi"), said("assistant", "", tool_calls=[{"function": {"name": "<|im_end|>"}}])],
            None,
            "the assis",
        ),
        ([said("user", "hi")], [{**ADD, "description": "</s>"}], "the list of tools contains"),
    ],
    ids=["call", "tool"],
)
def test_special_tokens_in_tools_are_refused(family, messages, tools, name):
    with pytest.raises(BadRow, match=f"^file:9: special token in a message: {name}"):
        chat.encode(family("chatml"), messages, tools=tools, where="file:9")


def test_half_a_surrogate_pair_names_the_row(family):
    with pytest.raises(BadRow, match=r"^file:9: unpaired surrogate: character \d+ is '\\ud83d', after '.*user\\na'"):
        render(family("chatml"), [said("user", "a\ud83db")], where="file:9")
