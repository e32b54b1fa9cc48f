import copy
import re

import pytest

from alignax.data import Example, Pair, Prompt, masks, parse, read, truncation
from alignax.data.checks import BOS, EOS, MASK, PREFIX, SPELLED, audit

W = "file:9"
TALK = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
EARLIER = [*TALK[0], *TALK[1], {"role": "user", "content": "oh"}]
CHATML = "{% for m in messages %}<|start|>{{ m.role[0] }}:{{ m.content }}<|end|>\n{% endfor %}"
ASK = "{{ '<|start|>a:' if add_generation_prompt }}"
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role[0] }}:{% if m.role == 'user' %}{{ m.content }}<|end|>{% else %}"
    "#{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.fixture
def check(tokenizer):
    def run(*items, template=CHATML + ASK, eos_ids=(2, 4), **options):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return audit(other, items, eos_ids=eos_ids, **options)

    return run


def example(prompt, completion):
    return Example(W, prompt, completion, {})


GOOD = {
    "text": example("", "abc"),
    "prompt": example("ab", "cd"),
    "messages": example(*TALK),
    "pair": Pair(W, "ab", "c", "d", {}),
    "prompt to sample from": Prompt(W, "ab", {}),
}


@pytest.mark.parametrize("item", GOOD.values(), ids=GOOD)
def test_good_rows(check, item):
    found = check(item, limit=20)
    assert (found.failed, found.dropped, found.fatal) == ({}, {}, False)
    assert len(found.rows) == 1 and len(found.rows[0].sides) == (2 if isinstance(item, Pair) else 1)


def test_every_turn(check):
    found = check(example(EARLIER, TALK[1]), every_turn=True)
    assert not found.failed and found.rows[0].sides[0].mask.sum() == 6  # yo<|end|> twice


BAD = {
    "EOS of a text": (
        EOS,
        example("a", "b"),
        {"eos_ids": [4]},
        r"a turn ends with \['</s>'\], and sampling with one of",
    ),
    "EOS of a side": (EOS, Pair(W, *TALK, [{**TALK[1][0], "content": "x"}], {}), {"eos_ids": [2]}, r"\['<\|end\|>'\]"),
    "EOS of an earlier turn": (EOS, example(EARLIER, TALK[1]), {"every_turn": True, "eos_ids": [2]}, "a turn ends"),
    "BOS": (BOS, example(*TALK), {"template": "<s><s>" + CHATML + ASK}, "it starts with '<s>' twice"),
    "BOS of a prompt": (
        BOS,
        Prompt(W, TALK[0], {}),
        {"template": "<s><s>" + CHATML + ASK},
        "it starts with '<s>' twice",
    ),
    "no prefix": (PREFIX, example(*TALK), {"template": CHATML + ASK.replace("a:", "a:#")}, "template is no prefix: "),
    "something between": (
        PREFIX,
        example(*TALK),
        {"template": MARKED + ASK},
        "the prompt has 9 tokens, and training starts at token 10",
    ),
    "nothing left": (
        MASK,
        example("abc", "d"),
        {"limit": 3, "truncate": truncation.keep_start},
        "nothing left: no token to train on among the 3 kept of 6",
    ),
}


@pytest.mark.parametrize("name, item, options, detail", BAD.values(), ids=BAD)
def test_what_ruins_training_is_found(check, name, item, options, detail):
    found = check(Prompt("file:1", "ab", {}), item, **options)
    assert list(found.failed) == [name] and found.fatal
    ((text,),) = found.failed.values()
    assert re.match(rf"file:9: .*{detail}", text), text


def test_spelled_special_tokens_are_no_reason_to_stop(check):
    found = check(example("<s>a", "b</s>"))
    assert found.failed == {SPELLED: ["file:9: its text contains ['<s>', '</s>'], which are split into characters"]}
    assert not found.fatal


def test_rows_left_out_are_named_and_lengths_are_those_before_the_cut(check):
    items, bad = [example("abc", "def"), example("a", "b")], []
    parse(read([{"text": "a"}, {"text": ""}]), drop=True, note=bad.append)
    found = check(*items, limit=4, bad=bad)
    assert [(row.length, len(row.sides)) for row in found.rows] == [(8, 0), (4, 1)]
    assert found.dropped == {
        "empty text": ["row[1]: empty text"],
        "longer than 4 tokens": ["file:9: longer than 4 tokens: it has 8"],
    }
    assert not found.fatal


def test_no_row_at_all(check):
    assert check().fatal and check(example("abc", "def"), limit=4).fatal


def test_prompts_are_cut(check):
    found = check(Prompt(W, "abc", {}), limit=2, truncate=truncation.keep_end)
    assert [side.length for side in found.rows[0].sides] == [2]
    assert list(check(Prompt(W, "abc", {}), limit=2).dropped) == ["longer than 2 tokens"]


def test_masks_are_handed_on(check):
    with pytest.raises(ValueError, match="the chat template has no"):
        check(example(*TALK), masks=masks.by_markers)
