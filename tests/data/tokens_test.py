import copy
import json
from functools import partial

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignax.data import (
    BadRow,
    Example,
    Pair,
    Prompt,
    collect,
    masks,
    parse,
    read,
    same_vocabulary,
    tokenize_example,
    tokenize_pair,
    tokenize_prompt,
    truncation,
)
from alignax.data.tokens import encode_prompt, encode_text, encode_texts

W = "file:9"
USER, REPLY, OTHER = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))


def mask(line):
    return [c == "x" for c in line]


def plain(row):
    return row.tokens.tolist(), row.mask.tolist()


def example(prompt, completion):
    return Example(W, prompt, completion, {})


def test_dtypes(tokenizer):
    row = tokenize_example(tokenizer, example("ab", "cd"), limit=9)
    assert row.tokens.dtype == np.int32 and row.mask.dtype == bool and row.length == 6


def test_prompt_and_completion(tokenizer, ids):
    row = tokenize_example(tokenizer, example("ab", " cd"), limit=9)
    assert plain(row) == (ids("^ab cd$"), mask("...xxxx"))
    row = tokenize_example(tokenizer, example("ab", " cd"), limit=9, eos=False)
    assert plain(row) == (ids("^ab cd"), mask("...xxx"))


def test_text_trains_on_all_that_something_predicts(tokenizer, spaced, ids):
    assert plain(tokenize_example(tokenizer, example("", "abc"), limit=9)) == (ids("^abc$"), mask(".xxxx"))
    tokens, got = plain(tokenize_example(spaced, example("", "abc"), limit=9))
    assert (spaced.convert_ids_to_tokens(tokens), got) == (["▁", "a", "b", "c", "</s>"], mask(".xxxx"))


@pytest.mark.parametrize("text", ["<s>", "a</s>b", "<|end|>", "<unk>"])
def test_special_tokens_in_texts_are_not_parsed(tokenizer, ids, text):
    written = ids(text)
    assert encode_text(tokenizer, text) == written
    assert encode_prompt(tokenizer, text) == [1, *written]
    assert plain(tokenize_example(tokenizer, example(text, text), limit=99)) == (
        [1, *written, *written, 2],
        [False] * (1 + len(text)) + [True] * (len(text) + 1),
    )

    assert tokenizer("</s>", add_special_tokens=False).input_ids == [2]  # the tokenizer is left as it was


@pytest.mark.parametrize("added, expected", [("<s> $A </s>", "^a"), ("$A </s>", "a"), ("$A <s>", "a")])
def test_bos_is_added_where_the_tokenizer_does_and_eos_never(tokenizer, ids, added, expected):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=added, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert len(other("a").input_ids) == len(added.split())
    assert encode_prompt(other, "a") == ids(expected)
    assert encode_prompt(other, "") == ids(expected[:-1])


def test_border(merging, spaced, ids):
    double = ids(" ")[0] + 1  # the token "=="
    assert encode_texts(merging, "a", "==b") == (ids("^a"), [double, *ids("b")])
    assert encode_texts(merging, "a=", "=b") == (ids("^a="), ids("=b"))
    assert encode_texts(merging, "a=", "= b") == (ids("^a="), ids("= b"))
    spell = spaced.convert_ids_to_tokens
    assert [spell(part) for part in encode_texts(spaced, "a=", "=b")] == [["▁", "a", "="], ["=", "b"]]
    assert [spell(part) for part in encode_texts(spaced, "a", " =b")] == [["▁", "a"], ["▁", "=", "b"]]


def test_messages(tokenizer, ids):
    row = tokenize_example(tokenizer, example([USER], [REPLY]), limit=99)
    assert plain(row) == (ids("{u:hi}\n{a:yo}\n"), mask("          xxx."))
    row = tokenize_example(tokenizer, example([USER, REPLY, USER], [OTHER]), limit=99)
    assert plain(row) == (ids("{u:hi}\n{a:yo}\n{u:hi}\n{a:no}\n"), mask(" " * 24 + "xxx "))
    row = tokenize_example(tokenizer, example([USER, REPLY, USER], [OTHER]), limit=99, every_turn=True)
    assert plain(row) == (ids("{u:hi}\n{a:yo}\n{u:hi}\n{a:no}\n"), mask("          xxx           xxx "))


def test_eos_follows_messages_whose_template_closes_nothing(tokenizer, ids):
    open_ended = copy.deepcopy(tokenizer)
    open_ended.chat_template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    row = tokenize_example(open_ended, example([USER], [REPLY]), limit=99)
    assert plain(row) == (ids("hi;yo;$"), mask("...xxxx"))


def test_tools_reach_the_template(family):
    tokenizer, tools = family("chatml"), [{"type": "function", "function": {"name": "f"}}]
    shown = tokenizer.decode(encode_prompt(tokenizer, [USER], tools=tools))
    assert shown.startswith('<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "f"}}<|im_end|>')
    start = tokenize_prompt(tokenizer, Prompt(W, [USER], {}, tools), limit=999).tokens.tolist()
    row = tokenize_example(tokenizer, Example(W, [USER], [REPLY], {}, tools), limit=999)
    pair = tokenize_pair(tokenizer, Pair(W, [USER], [REPLY], [OTHER], {}, tools), limit=999)
    for side in (row, *pair):
        assert side.tokens[: len(start)].tolist() == start and side.mask.argmax() == len(start)


def test_masks_are_a_choice(tokenizer):
    for tokenize, row in (
        (tokenize_example, example([USER], [REPLY])),
        (tokenize_pair, Pair(W, [USER], [REPLY], [OTHER], {})),
    ):
        tokenize(tokenizer, row, limit=99, masks=masks.by_prefix)
        with pytest.raises(ValueError, match=r"the chat template has no \{% generation %\} markers"):
            tokenize(tokenizer, row, limit=99, masks=masks.by_markers)


BROKEN = "a\udc00"
HALVES = {
    "example": (tokenize_example, example(BROKEN, "b")),
    "completion": (tokenize_example, example("b", BROKEN)),
    "messages": (tokenize_example, example([USER], [{**REPLY, "content": BROKEN}])),
    "pair": (tokenize_pair, Pair(W, "a", "b", BROKEN, {})),
    "prompt": (tokenize_prompt, Prompt(W, BROKEN, {})),
}


@pytest.mark.parametrize("tokenize, row", HALVES.values(), ids=HALVES)
def test_half_a_surrogate_pair_names_the_row(tokenizer, tokenize, row):
    with pytest.raises(BadRow, match=r"^file:9: unpaired surrogate: character \d+ is '\\udc00', after '"):
        tokenize(tokenizer, row, limit=99)


def test_same_vocabulary(tokenizer, merging, spaced):
    same_vocabulary(tokenizer, copy.deepcopy(tokenizer))
    double = len(tokenizer)  # the one token that `merging` has besides
    with pytest.raises(ValueError, match=rf"token {double} is absent in the first, of {double} .* '==' in the second"):
        same_vocabulary(tokenizer, merging)
    with pytest.raises(ValueError, match=rf"differ: token {double - 1} is ' ' in the first, .* '▁' in the second"):
        same_vocabulary(tokenizer, spaced)


def test_pair(tokenizer, ids):
    row = tokenize_pair(tokenizer, Pair(W, "ab", "c", "dd", {}), limit=9)
    assert plain(row.chosen) == (ids("^abc$"), mask("...xx"))
    assert plain(row.rejected) == (ids("^abdd$"), mask("...xxx"))
    assert row.length == 6
    row = tokenize_pair(tokenizer, Pair(W, [USER], [REPLY], [OTHER], {}), limit=99)
    assert plain(row.rejected) == (ids("{u:hi}\n{a:no}\n"), mask("          xxx "))


def test_prompt(tokenizer, ids):
    row = tokenize_prompt(tokenizer, Prompt(W, "ab", {"answer": 3}), limit=9)
    assert (row.tokens.tolist(), row.prompt, row.columns, row.length) == (ids("^ab"), "ab", {"answer": 3}, 3)
    assert tokenize_prompt(tokenizer, Prompt(W, [USER], {}), limit=99).tokens.tolist() == ids("{u:hi}\n{a:")


CUTS = {
    "start": (truncation.keep_start, "^abcdef", mask("....xxx")),
    "end": (truncation.keep_end, "bcdefg$", mask("..xxxxx")),
}


@pytest.mark.parametrize("truncate, text, expected", CUTS.values(), ids=CUTS)
def test_truncation(tokenizer, ids, truncate, text, expected):
    row = tokenize_example(tokenizer, example("abc", "defg"), limit=7, truncate=truncate)
    assert plain(row) == (ids(text), expected)


def test_first_token_of_a_cut_row_is_not_trained_on(tokenizer, ids):
    row = tokenize_example(tokenizer, example("a", "bcdef"), limit=4, truncate=truncation.keep_end)
    assert plain(row) == (ids("def$"), mask(".xxx"))


def test_pairs_are_cut_alike(tokenizer, ids):
    pair = Pair(W, "abc", "def", "g", {})
    row = tokenize_pair(tokenizer, pair, limit=5, truncate=truncation.keep_end)
    assert (plain(row.chosen), plain(row.rejected)) == ((ids("cdef$"), mask(".xxxx")), (ids("cg$"), mask(".xx")))
    row = tokenize_pair(tokenizer, pair, limit=5, truncate=truncation.keep_start)
    assert (plain(row.chosen), plain(row.rejected)) == ((ids("^abcd"), mask("....x")), (ids("^abcg"), mask("....x")))


@pytest.mark.parametrize("limit", [8, 9])
def test_limit_is_inclusive(tokenizer, limit):
    row = example("abc", "defg")  # 9 tokens
    if limit == 9:
        assert tokenize_example(tokenizer, row, limit=limit).length == 9
    else:
        with pytest.raises(BadRow, match="file:9: longer than 8 tokens: it has 9"):
            tokenize_example(tokenizer, row, limit=limit)


def test_too_long_is_counted_or_raised(tokenizer):
    prompts = [Prompt(f"file:{n}", "a" * n, {}) for n in range(1, 6)]
    encode = partial(tokenize_prompt, tokenizer, limit=4)
    kept, dropped = collect(partial(encode, truncate=truncation.drop), prompts)
    assert ([row.length for row in kept], dropped) == ([2, 3, 4], {"longer than 4 tokens": 2})
    with pytest.raises(BadRow, match="file:4: longer than 4 tokens: it has 5"):
        collect(encode, prompts)
    kept, _ = collect(partial(encode, truncate=truncation.keep_end), prompts)
    assert [row.length for row in kept] == [2, 3, 4, 4, 4]


def test_nothing_left(tokenizer):
    with pytest.raises(BadRow, match="file:9: nothing left: no token to train on among the 3 kept of 7"):
        tokenize_example(tokenizer, example("abc", "de"), limit=3, truncate=truncation.keep_start)
    with pytest.raises(BadRow, match="nothing left: of 3 tokens none is the prompt's"):
        tokenize_pair(tokenizer, Pair(W, "a", "bcd", "e", {}), limit=3, truncate=truncation.keep_end)
    with pytest.raises(BadRow, match="nothing left: of 4 tokens none is the prompt's"):
        tokenize_pair(tokenizer, Pair(W, "a", "bcd", "e", {}), limit=4, truncate=truncation.keep_end)
    with pytest.raises(BadRow, match="nothing left: chosen and rejected are equal once cut to 5 tokens"):
        tokenize_pair(tokenizer, Pair(W, "a", "bcde", "bcdf", {}), limit=5, truncate=truncation.keep_start)


def test_pair_whose_tokens_are_equal(tokenizer):
    with pytest.raises(BadRow, match="chosen equals rejected: their tokens are the same"):
        tokenize_pair(tokenizer, Pair(W, "a", "é", "ü", {}), limit=9)


def test_prompt_without_tokens(spaced):
    with pytest.raises(BadRow, match="file:9: empty prompt: it has no tokens"):
        tokenize_prompt(spaced, Prompt(W, "", {}), limit=9)


def test_no_eos(tokenizer):
    core = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="eos=True, but the tokenizer has no eos_token"):
        tokenize_example(core, example("a", "b"), limit=9)
    assert tokenize_example(core, example("a", "b"), limit=9, eos=False).length == 2


def test_text_and_messages_do_not_mix(tokenizer):
    with pytest.raises(TypeError, match="file:9: prompt and completion must both be texts or both be messages"):
        tokenize_example(tokenizer, example("a", [REPLY]), limit=9)


@pytest.fixture(scope="module")
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")


def test_stories_specials_and_spaces(stories):
    assert encode_prompt(stories, "<s>a") == [1, 410, 504, 419, 505, 412]  # as a special token it would be [1, 1, 261]
    prompt, completion = encode_texts(stories, "Once", "  upon </s> a")
    assert stories.decode(prompt + completion, skip_special_tokens=True) == "Once  upon </s> a"


def test_rows_are_those_of_trl(shared, stories):
    oracle = json.loads((shared / "spec/oracles/trl_sft_dpo.json").read_text())
    for pair, row in zip(oracle["pairs"], oracle["dpo"]["dataset_rows"], strict=True):
        got = tokenize_pair(stories, Pair("", **pair, columns={}), limit=512)
        prompt = len(row["prompt_ids"])
        assert got.chosen.tokens.tolist() == row["prompt_ids"] + row["chosen_ids"]
        assert got.rejected.tokens.tolist() == row["prompt_ids"] + row["rejected_ids"]
        assert got.chosen.mask.tolist() == [False] * prompt + [True] * len(row["chosen_ids"])


@pytest.mark.parametrize(
    "name, fit", [("hh-rlhf/harmless-base-test.jsonl", 700), ("ultrafeedback/train_1000.jsonl", 155)]
)
def test_pairs_that_fit(shared, stories, name, fit):
    pairs, _ = parse(read(shared / "data" / name), drop=True)
    kept, dropped = collect(partial(tokenize_pair, stories, limit=512, truncate=truncation.drop), pairs)
    assert (len(kept), dropped) == (fit, {"longer than 512 tokens": len(pairs) - fit})


@pytest.mark.parametrize("file", ["models/tokenizers/gpt2/tokenizer.json", "data/torchtune/tiny_bpe_tokenizer.json"])
def test_completions_follow_their_prompt_whatever_the_border(shared, file):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(shared / file))
    pairs, _ = parse(read(shared / "data/ultrafeedback/train_1000.jsonl"), drop=True)
    spanned = 0
    for pair in pairs[:200]:
        prompt, completion = encode_texts(tokenizer, pair.prompt, pair.chosen)
        whole = encode_text(tokenizer, pair.prompt + pair.chosen)
        assert prompt == encode_prompt(tokenizer, pair.prompt)
        assert tokenizer.decode(prompt + completion) == tokenizer.decode(whole)
        spanned += prompt + completion != whole
    assert 0 < spanned < 20


def test_real_conversations(shared, stories):
    chat = copy.deepcopy(stories)
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    pairs, _ = parse(read(shared / "data/llamafactory/dpo_en_demo.json"))
    for pair in pairs[:50]:
        row = tokenize_pair(chat, pair, limit=10**6)
        text = chat.decode(row.chosen.tokens[row.chosen.mask], skip_special_tokens=True)
        assert text.strip() == pair.chosen[0]["content"].strip()
        assert row.chosen.tokens[0] == 1 and (row.chosen.tokens == 1).sum() == 1 and row.chosen.tokens[-1] == 2
