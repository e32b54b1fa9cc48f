from functools import partial

import pytest

from alignax.data import BadRow, Example, Pair, Prompt, Row, formats, parse, read

W = "rows.jsonl:3"
USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))
SYSTEM = {"role": "system", "content": ""}


def call(name, arguments, **rest):
    tool_call = {**rest, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [tool_call]}


def one(fields, format=None, **options):
    ((row,), dropped) = parse([Row(W, fields)], format, **options)
    assert not dropped
    return row


GOOD = {
    "text": ({"text": "abc", "id": 7}, Example(W, "", "abc", {"id": 7})),
    "prompt, completion": ({"prompt": "a", "completion": " b"}, Example(W, "a", " b", {})),
    "prompt, completion as messages": ({"prompt": [USER], "completion": [REPLY]}, Example(W, [USER], [REPLY], {})),
    "messages for a text prompt": ({"prompt": "hi", "completion": [REPLY]}, Example(W, [USER], [REPLY], {})),
    "messages": ({"messages": [SYSTEM, USER, REPLY]}, Example(W, [SYSTEM, USER], [REPLY], {})),
    "messages and a label": ({"messages": [USER, REPLY], "label": True}, Example(W, [USER], [REPLY], {"label": True})),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        Example(W, [USER], [REPLY], {}),
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]}, REPLY]},
        Example(W, [USER], [REPLY], {}),
    ),
    "tool call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        Example(W, [USER], [call("f", {})], {}),
    ),
    "tools": (
        {"messages": [USER, REPLY], "tools": [{"name": "f"}], "id": 7},
        Example(W, [USER], [REPLY], {"id": 7}, [{"type": "function", "function": {"name": "f"}}]),
    ),
    "tools of texts are any column": (
        {"prompt": "a", "completion": "b", "tools": "hammer"},
        Example(W, "a", "b", {"tools": "hammer"}),
    ),
    "tools of a prompt": (
        {"prompt": [USER], "tools": '[{"name": "f"}]'},
        Prompt(W, [USER], {}, [{"type": "function", "function": {"name": "f"}}]),
    ),
    "tools of a pair": (
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER], "tools": "[]"},
        Pair(W, [USER], [REPLY], [OTHER], {}, None),
    ),
    "a reply that goes on from what tools said": (
        {
            "messages": [
                *(USER, REPLY, USER),
                call("f", {}, id="x1"),
                {"role": "tool", "content": "", "tool_call_id": "x1"},
                {"role": "tool", "content": "?", "tool_call_id": "x2"},
                REPLY,
            ]
        },
        Example(
            W,
            [USER, REPLY, USER],
            [
                call("f", {}, id="x1"),
                {"role": "tool", "content": "", "tool_call_id": "x1", "name": "f"},
                {"role": "tool", "content": "?", "tool_call_id": "x2"},
                REPLY,
            ],
            {},
        ),
    ),
    "a tool that was called in words": (
        {"messages": [USER, REPLY, {"role": "tool", "content": "3"}, OTHER]},
        Example(W, [USER], [REPLY, {"role": "tool", "content": "3"}, OTHER], {}),
    ),
    "ShareGPT calls": (
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"a\\": 1}"}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "yo"},
            ],
            "tools": '[{"name": "f"}]',
        },
        Example(
            W,
            [USER],
            [call("f", {"a": 1}), {"role": "tool", "content": "3", "name": "f"}, REPLY],
            {},
            [{"type": "function", "function": {"name": "f"}}],
        ),
    ),
    "a call without content": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        Example(W, [USER], [call("f", {})], {}),
    ),
    "system beside an instruction": (
        {"instruction": "hi", "output": "yo", "system": "be brief"},
        Example(W, [{"role": "system", "content": "be brief"}, USER], [REPLY], {}),
    ),
    "system beside the conversation of a pair": (
        {"conversations": [USER], "chosen": REPLY, "rejected": OTHER, "system": "be brief"},
        Pair(W, [{"role": "system", "content": "be brief"}, USER], [REPLY], [OTHER], {}),
    ),
    "instruction": ({"instruction": "hi", "input": "", "output": "yo"}, Example(W, [USER], [REPLY], {})),
    "instruction with input": (
        {"instruction": "add", "input": "1 2", "output": "yo"},
        Example(W, [{"role": "user", "content": "add\n1 2"}], [REPLY], {}),
    ),
    "prompt": ({"prompt": "a", "answer": 4}, Prompt(W, "a", {"answer": 4})),
    "prompt as messages": ({"prompt": [USER]}, Prompt(W, [USER], {})),
    "pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "score": 1},
        Pair(W, "a", "b", "c", {"score": 1}),
    ),
    "implicit pair": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I do",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: I don't",
        },
        Pair(W, "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " I do", " I don't", {}),
    ),
    "implicit pair of messages": (
        {"chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        Pair(W, [USER], [REPLY], [OTHER], {}),
    ),
    "pair that repeats its prompt, as messages": (
        {"prompt": "hi", "chosen": [SYSTEM, USER, REPLY], "rejected": [SYSTEM, USER, OTHER]},
        Pair(W, [SYSTEM, USER], [REPLY], [OTHER], {}),
    ),
    "pair that repeats its prompt's messages": (
        {"prompt": [USER], "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        Pair(W, [USER], [REPLY], [OTHER], {}),
    ),
    "pair with a system prompt": (
        {"prompt": [SYSTEM], "chosen": [USER, REPLY], "rejected": [USER, OTHER]},
        Pair(W, [SYSTEM, USER], [REPLY], [OTHER], {}),
    ),
    "pair of replies to messages": (
        {"prompt": [USER], "chosen": [REPLY], "rejected": [OTHER]},
        Pair(W, [USER], [REPLY], [OTHER], {}),
    ),
    "pair of texts after messages": (
        {"prompt": [USER], "chosen": "yo", "rejected": "no"},
        Pair(W, [USER], [REPLY], [OTHER], {}),
    ),
    "pair that goes on in common": (
        {"prompt": [USER], "chosen": [REPLY, USER, REPLY], "rejected": [REPLY, USER, OTHER]},
        Pair(W, [USER, REPLY, USER], [REPLY], [OTHER], {}),
    ),
    "pair after conversations": (
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yo"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        Pair(W, [USER], [REPLY], [OTHER], {}),
    ),
}


@pytest.mark.parametrize("fields, expected", GOOD.values(), ids=GOOD)
def test_formats(fields, expected):
    assert one(fields) == expected


BAD = {
    "unknown": ({"q": "a"}, r"unknown format: found \['q'\], expected one of: chosen, rejected; messages"),
    "empty text": ({"text": " \n"}, "empty text"),
    "no text": ({"text": None}, "wrong type: text must be a text, got NoneType"),
    "empty prompt": ({"prompt": "", "completion": "b"}, "empty prompt"),
    "empty completion": ({"prompt": "a", "completion": ""}, "empty completion"),
    "empty messages": ({"messages": []}, "empty messages"),
    "empty message": ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"empty message: messages\[1\]"),
    "no message": ({"messages": ["hi"]}, "must be a list of messages, got list"),
    "no role": ({"messages": [{"content": "a"}]}, r"messages\[0\] needs role and content, found \['content'\]"),
    "unknown speaker": ({"conversations": [{"from": "bot", "value": "a"}]}, "is from 'bot'; known are"),
    "tools that are none": ({"messages": [USER, REPLY], "tools": "hammer"}, "tools is not valid JSON"),
    "call that is none": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": "f()"}]},
        r"messages\[1\], its call, is not valid JSON",
    ),
    "only tools before the reply": (
        {"messages": [call("f", {}), {"role": "tool", "content": "3"}, REPLY]},
        "empty prompt: nothing comes before the assistant's first message",
    ),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "a part that is no text"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "must be texts, got 'user', 3"),
    "user has the last word": ({"messages": [USER, REPLY, USER]}, "no reply: the last of 3 messages is the user's"),
    "reply alone": ({"messages": [REPLY]}, "empty prompt: nothing comes before the assistant's first message"),
    "answered prompt": ({"prompt": [USER, REPLY]}, "prompt already answered"),
    "user completes": ({"prompt": [USER], "completion": [USER]}, r"no reply: .* got \['user'\]"),
    "equal pair": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
    "empty chosen": ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty chosen"),
    "empty after the prompt": (
        {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "empty completion",
    ),
    "no prompt in common": ({"chosen": "The cat", "rejected": "The dog"}, "share no message or"),
    "no message in common": ({"chosen": [REPLY], "rejected": [OTHER]}, "no prompt: "),
    "part at the user's": (
        {"chosen": [USER, REPLY, USER, REPLY], "rejected": [USER, REPLY, {**USER, "content": "x"}, REPLY]},
        r"no reply: .* got \['user', 'assistant'\]",
    ),
    "chosen is a part of rejected": ({"chosen": [USER, REPLY], "rejected": [USER, REPLY, USER, REPLY]}, r"got \[\]"),
    "text and messages": ({"chosen": "a", "rejected": [REPLY]}, "without a prompt, .* both texts or both messages"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_bad_rows_are_named(fields, message):
    with pytest.raises(BadRow, match=rf"^rows\.jsonl:3: .*{message}"):
        one(fields)


def test_missing_field_names_row_found_and_expected():
    rows = [Row("a:1", {"prompt": "a", "completion": "b"}), Row("a:2", {"prompt": "a", "response": "b"})]
    with pytest.raises(BadRow, match=r"a:2: missing field: expected \['prompt', 'completion'\], found \['prompt', 're"):
        parse(rows)
    kept, dropped = parse(rows, drop=True)
    assert (len(kept), dropped) == (1, {"missing field": 1})


def test_columns_are_renamed():
    row = one({"question": "a", "answer": "4"}, columns={"question": "prompt"})
    assert row == Prompt(W, "a", {"answer": "4"})
    assert one({"a": "x", "b": "y"}, columns={"a": "prompt", "b": "completion"}) == Example(W, "x", "y", {})
    assert (
        one({"prompt": "x", "completion": "y"}, columns={"prompt": "completion", "completion": "prompt"}).prompt == "y"
    )
    with pytest.raises(BadRow, match=r"missing field: expected \['question'\] to rename, found \['q'\]"):
        one({"q": "a"}, columns={"question": "prompt"})
    with pytest.raises(BadRow, match="renaming 'q' would overwrite 'prompt'"):
        one({"q": "a", "prompt": "b"}, columns={"q": "prompt"})


def test_a_format_can_be_given():
    row = {"chosen": "Q: a A: b", "rejected": "Q: a A: c"}
    assert one(row, partial(formats.pairs, marker=" A:")) == Pair(W, "Q: a A:", " b", " c", {})
    assert one({"prompt": "a", "completion": "b"}, formats.prompts) == Prompt(W, "a", {"completion": "b"})
    assert one({"x": 1}, lambda row: row.fields["x"]) == 1


def test_no_rows():
    with pytest.raises(ValueError, match="no rows"):
        parse([])


REAL = {
    "hh-rlhf/harmless-base-test.jsonl": (Pair, 997, {"empty completion": 3}, None),
    "ultrafeedback/train_1000.jsonl": (
        Pair,
        994,
        {"chosen equals rejected": 4, "empty chosen": 1, "empty rejected": 1},
        None,
    ),
    "llamafactory/dpo_en_demo.json": (Pair, 300, {}, None),
    "llamafactory/v1_dpo_demo.jsonl": (
        Pair,
        10,
        {},
        {"chosen_messages": "chosen", "rejected_messages": "rejected"},
    ),
    "llamafactory/kto_en_demo.json": (Example, 300, {}, None),
    "llamafactory/identity.json": (Example, 91, {}, None),
    "torchtune/stack_exchange_paired_tiny.json": (
        Pair,
        25,
        {},
        {"question": "prompt", "response_j": "chosen", "response_k": "rejected"},
    ),
    "truthfulqa/finetune_truth.jsonl": (Example, 2000, {}, None),
    "gsm8k/train.jsonl": (Prompt, 7473, {}, {"question": "prompt"}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data(shared, name):
    kind, count, expected, columns = REAL[name]
    kept, dropped = parse(read(shared / "data" / name), columns=columns, drop=True)
    assert (len(kept), dropped) == (count, expected)
    assert all(type(row) is kind for row in kept)


def test_real_bad_row_is_named(shared):
    with pytest.raises(BadRow, match=r"harmless-base-test\.jsonl:\d+: empty completion"):
        parse(read(shared / "data/hh-rlhf/harmless-base-test.jsonl"))


def test_hh_rlhf_parts_put_together_are_the_row(shared):
    path = shared / "data/hh-rlhf/harmless-base-test.jsonl"
    whole = {row.where: row.fields for row in read(path)}
    for pair in parse(read(path), drop=True)[0]:
        assert pair.prompt + pair.chosen == whole[pair.where]["chosen"]
        assert pair.prompt + pair.rejected == whole[pair.where]["rejected"]
        assert pair.prompt.endswith("\n\nAssistant:") and "\n\nHuman:" not in pair.chosen + pair.rejected


def test_a_text_prompt_that_both_sides_repeat_is_said_once():
    row = Row("x:1", {"prompt": "Q: x\nA:", "chosen": "Q: x\nA: yes", "rejected": "Q: x\nA: no"})
    assert formats.pairs(row)[1:4] == ("Q: x\nA:", " yes", " no")


def test_a_system_text_beside_a_conversation_comes_first():
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    example = formats.messages(Row("x:1", {"conversations": talk, "system": "be brief", "id": 7}))
    assert example.prompt[0] == {"role": "system", "content": "be brief"} and len(example.prompt) == 2
    assert example.columns == {"id": 7}
