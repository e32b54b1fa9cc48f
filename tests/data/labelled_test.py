"""Answers said to be good or bad: their labels, their batches, and rows with the completion of another."""

from functools import partial

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from alignax import data
from alignax.data import BadRow, Example, TokenLabelled, TokenRow, batching, truncation


def answer(prompt, completion, good):
    ids, trained = [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)
    return TokenLabelled(TokenRow(np.array(ids, np.int32), np.array(trained)), good)


ROWS = [answer([1], [2, 3, 4], True), answer([5, 6], [7], False), answer([8, 9], [10, 11, 12], True)]


def shown(batch, prefix=""):
    """Rows without their padding, and the tokens that are trained on."""
    arrays = [batch[prefix + name] for name in ("tokens", "segments", "mask")]
    return [(t[s > 0].tolist(), t[m].tolist()) for t, s, m in zip(*arrays, strict=True)]


def test_a_batch_with_labels():
    batch = batching.labelled(ROWS, np.ones(3, np.float32), width=5)
    assert shown(batch) == [([1, 2, 3, 4], [2, 3, 4]), ([5, 6, 7], [7]), ([8, 9, 10, 11, 12], [10, 11, 12])]
    np.testing.assert_array_equal(batch["desirable"], [True, False, True])
    assert batch["desirable"].dtype == bool and set(batch) == {"tokens", "segments", "mask", "weights", "desirable"}


def test_each_prompt_gets_the_completion_of_the_row_before():
    batch = batching.unpaired(ROWS, np.ones(3, np.float32), width=5)
    expected = [([1, 10, 11, 12], [10, 11, 12]), ([5, 6, 2, 3, 4], [2, 3, 4]), ([8, 9, 7], [7])]
    assert shown(batch, "mismatched_") == expected
    narrow = batching.unpaired(ROWS[:2], np.ones(2, np.float32), width=4)  # its end does not fit
    assert shown(narrow, "mismatched_") == [([1, 7], [7]), ([5, 6, 2, 3], [2, 3])]
    assert {name: x for name, x in batch.items() if not name.startswith("mismatched_")}.keys() == {
        *("tokens", "segments", "mask", "weights", "desirable")
    }


def test_fillers_lend_no_completion_and_a_row_alone_has_no_other():
    filled = [*ROWS[:2], ROWS[0], ROWS[0]]
    batch = batching.unpaired(filled, np.float32([1, 1, 0, 0]), width=5)
    assert shown(batch, "mismatched_")[:2] == [([1, 7], [7]), ([5, 6, 2, 3, 4], [2, 3, 4])]
    assert not batch["mismatched_mask"][2:].any()
    assert not batching.unpaired([ROWS[0]] * 3, np.float32([1, 0, 0]), width=5)["mismatched_mask"].any()
    with pytest.raises(ValueError, match="a batch of one row; expected at least 2: KTO pairs each prompt"):
        batching.unpaired(ROWS[:1], np.ones(1, np.float32), width=5)


def test_turns_and_tools_keep_their_masks():
    holes = TokenLabelled(TokenRow(np.arange(20, 25, dtype=np.int32), np.array([0, 1, 0, 1, 0], bool)), True)
    batch = batching.unpaired([holes, ROWS[1]], np.ones(2, np.float32), width=6)
    assert shown(batch, "mismatched_") == [([20, 7], [7]), ([5, 6, 21, 22, 23, 24], [21, 23])]


def test_iteration_and_statistics():
    (first, position), (last, _) = data.batches(ROWS, batching.unpaired, batch_size=2, buckets=[5], seed=None, epochs=1)
    assert position == (0, 1) and last["weights"].tolist() == [1, 0] and not last["mismatched_mask"].any()
    assert first["mismatched_mask"].sum() == first["mask"].sum()
    assert batching.statistics(ROWS, batch_size=2, buckets=[5]) == "3 rows, 12 tokens, 7 trained on; batches 60% full"


def test_labels(tokenizer, ids):
    label = partial(data.tokenize_labelled, tokenizer, limit=20)
    for value, good in ((True, True), (False, False), (1, True), (0, False)):
        row = label(Example("f:1", "ab", "cd", {"label": value}))
        assert row.desirable is good and row.row.tokens.tolist() == ids("^abcd$") and row.length == 6
    tagged = Example("f:1", "ab", "cd", {"kto_tag": True})
    assert label(tagged, label="kto_tag").desirable
    with pytest.raises(BadRow, match=r"f:1: no label: found the columns \['kto_tag'\], expected 'label'"):
        label(tagged)
    for wrong in ("good", 2, None, 0.5, "true"):
        with pytest.raises(BadRow, match=r"f:1: wrong label: .*; expected true or false"):
            label(Example("f:1", "ab", "cd", {"label": wrong}))
    with pytest.raises(BadRow, match="f:1"):
        label(Example("f:1", "ab", "c" * 20, {"label": True}))


def test_llama_factorys_demonstration(shared):
    """Its 300 conversations with a label, in a template, by the tokens of GPT-2."""
    file = str(shared / "models/tokenizers/gpt2/tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    examples, bad = data.parse(data.read(str(shared / "data/llamafactory/kto_en_demo.json")))
    encode = partial(data.tokenize_labelled, tokenizer, limit=1024, truncate=truncation.drop)
    rows, dropped = data.collect(encode, examples)
    assert len(examples) == 300 and not bad
    assert len(rows) + dropped.total() == 300 and len(rows) > 200
    batches = list(data.batches(rows, batching.unpaired, batch_size=16, buckets=[256, 512, 1024], epochs=1))
    good = sum(int(batch["desirable"][batch["weights"] > 0].sum()) for batch, _ in batches)
    assert good == sum(row.desirable for row in rows) and 100 < good < 150
    own, others = (sum(int(batch[name].sum()) for batch, _ in batches) for name in ("mask", "mismatched_mask"))
    assert 0.9 < others / own <= 1, others / own  # most fit beside another prompt
