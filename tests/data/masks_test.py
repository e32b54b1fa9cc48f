import copy
import itertools

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from alignax.data import BadRow, chat, masks

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TALK = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]
PLAIN = [TALK[0], TALK[3], *TALK[4:]]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def trained(tokenizer, messages, **options):
    """The texts of what is trained on, run by run."""
    ids, mask = chat.encode_turns(tokenizer, messages, **options)
    runs = itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for on, run in runs if on]


TURNS = {
    "chatml": [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
        "Bye<|im_end|>",
    ],
    "llama3": ['{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "It is 3.<|eot_id|>", "Bye<|eot_id|>"],
    "marked": [
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
        "Bye<|im_end|>",
    ],
    "mistral": [" It is 3.</s>", " Bye</s>"],
    "gemma": ["It is 3.<end_of_turn>", "Bye<end_of_turn>"],
    "thinking": ["It is 3.<|im_end|>", "Bye<|im_end|>"],
    "phi3": ["It is 3.<|end|>", "Bye<|end|>\n</s>"],  # its last turn ends with the EOS of the conversation
}


@pytest.mark.parametrize("way", [masks.automatic, masks.by_prefix])
@pytest.mark.parametrize("name", TURNS)
def test_turns_of_the_families(family, name, way):
    """Calls are trained on and what the tool answers is not; each turn ends with the token that ends it."""
    messages, tools = (TALK, [ADD]) if name in ("chatml", "llama3", "marked") else (PLAIN, None)
    assert trained(family(name), messages, tools=tools, masks=way) == TURNS[name]
    last = len(messages) - 1
    assert trained(family(name), messages, first=last, tools=tools, masks=way) == TURNS[name][-1:]


def test_thoughts_that_are_taken_out_of_earlier_turns(family):
    thought = [{**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in PLAIN]
    assert trained(family("thinking"), thought, first=3) == ["<think>hm</think>Bye<|im_end|>"]
    with pytest.raises(
        BadRow, match=r"^file:9: template is no prefix: .* the template changes message 1 once others fol"
    ):
        chat.encode_turns(family("thinking"), thought, where="file:9")


def test_an_opening_message_of_the_assistant_answers_nothing(family):
    opened = [{"role": "assistant", "content": "Hello"}, *PLAIN]
    for way in (masks.by_prefix, masks.by_markers):
        assert trained(family("marked"), opened, masks=way) == TURNS["marked"][1:]


def test_markers_that_are_required_and_absent(family):
    with pytest.raises(ValueError, match=r"the chat template has no \{% generation %\} markers: put them around"):
        chat.encode_turns(family("chatml"), PLAIN, masks=masks.by_markers)


def test_markers_need_offsets(family):
    class Slow:
        is_fast = False
        get_chat_template = staticmethod(lambda **_: "{% generation %}{% endgeneration %}")

    with pytest.raises(ValueError, match="markers need the offsets of a fast tokenizer, got Slow"):
        masks.by_markers(Slow(), [1], PLAIN)


LAYOUTS = {
    "tight": "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n",
    "end left out": "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n",
    "on lines of their own": "\n  {% generation %}\n{{ m.content }}<|im_end|>\n  {% endgeneration %}\n",
    "white space cut": " {%- generation -%}  \n{{ m.content }}<|im_end|>  {%- endgeneration +%}\n",
    "in two": "{% generation %}{{ m.content[0] }}{% endgeneration %}{%- generation %}{{ m.content[1:] }}<|im_end|>"
    "{% endgeneration %}\n",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_however_the_markers_are_written(family, layout):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}" + layout + "{% else %}"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{{ '<|im_start|>assistant:' if add_generation_prompt }}"
    )
    tokenizer = with_template(family("chatml"), template)
    for way in (masks.by_markers, masks.by_prefix):
        assert [turn.strip() for turn in trained(tokenizer, PLAIN, masks=way)] == TURNS["thinking"]


def test_markers_around_what_asks_for_the_answer(family):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    assert trained(with_template(family("chatml"), template), PLAIN) == TURNS["thinking"]


def test_blocks_that_touch_are_one(family):
    """White space between them is the assistant's, as behind the token that ends a thought."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}hm</s>{{ '\n' }}"
        "{%- endgeneration %}{%- generation %}{{ '\n' + m.content }}<|im_end|>{% endgeneration %}{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}{{ '<|im_start|>assistant:' if add_generation_prompt }}"
    )
    tokenizer = with_template(family("chatml"), template)
    for way in (masks.by_markers, masks.by_prefix):
        assert trained(tokenizer, PLAIN[:2], masks=way) == ["hm</s>\n\nIt is 3.<|im_end|>"]


def test_markers_do_not_excuse_a_prompt_that_is_no_prefix(family):
    tokenizer = family("marked")
    asking = tokenizer.chat_template.replace("assistant\\n' if", "assistant\\n#' if")
    assert asking != tokenizer.chat_template
    with pytest.raises(BadRow, match=r"^file:9: template is no prefix: rendered up to message 3, .* is \['#'\]"):
        chat.encode_turns(with_template(tokenizer, asking), PLAIN, where="file:9")


def test_a_noncharacter_in_a_message_is_not_taken_for_a_marker(family):
    with pytest.raises(BadRow, match=r"^file:9: template refused: its markers move its text, or a message contains"):
        chat.encode_turns(family("marked"), [PLAIN[0], {**PLAIN[1], "content": "a\ufdd1b"}], where="file:9")


@pytest.fixture(scope="module")
def gpt2(shared):
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "models/tokenizers/gpt2/tokenizer.json"), eos_token="<|endoftext|>"
    )


SIMPLE = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %} {{ m.content }}<|endoftext|>"
    "{% endgeneration %}{% else %} {{ m.content }}\n{% endif %}{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
)


@pytest.mark.parametrize("content", ["It is 3.", "yes\n", "caffè 日本", ""])
def test_markers_are_those_of_transformers(gpt2, content):
    """The expected mask is transformers' own, where it has none of the faults of the next test."""
    tokenizer = with_template(gpt2, SIMPLE)
    messages = [PLAIN[0], {**PLAIN[1], "content": content}, *PLAIN[2:]]
    golden = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for way in (masks.by_markers, masks.by_prefix):
        ids, mask = chat.encode_turns(tokenizer, messages, masks=way)
        assert ids == golden["input_ids"]
        np.testing.assert_array_equal(mask, np.array(golden["assistant_masks"], bool))


def test_a_last_character_of_several_tokens(gpt2):
    cut = SIMPLE.replace("<|endoftext|>{% endgeneration %}", "{% endgeneration %}<|endoftext|>")
    messages = [PLAIN[0], {**PLAIN[1], "content": "日"}]
    assert trained(with_template(gpt2, cut), messages) == [" 日<|endoftext|>"]


def test_a_token_across_the_start_of_a_block_is_refused(gpt2):
    glued = SIMPLE.replace("{% generation %} {{ m.content }}", " {% generation %}{{ m.content }}")
    with pytest.raises(BadRow, match=r"^file:9: template is no prefix: token 10 begins before what the assistant says"):
        chat.encode_turns(with_template(gpt2, glued), PLAIN[:2], where="file:9")
