import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from alignax.data import text


def arrays(ids, rows):
    """Rows of prompt and completion, as a sampler returns them: "prompt|completion", padded with 0."""
    width = max(len(row) - 1 for row in rows) + 1
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        start, whole = row.index("|"), ids(row.replace("|", "", 1))
        tokens[i, : len(whole)], mask[i, start : len(whole)] = whole, True
    return tokens, mask


def test_encode(tokenizer, ids):
    tokens, lengths = text.encode(tokenizer, ["abc", "d"], pad_id=9)
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(tokens, [ids("^abc"), [*ids("^d"), 9, 9]])
    np.testing.assert_array_equal(lengths, [4, 2])
    assert text.encode(tokenizer, ["abc", "d"], width=6)[0].shape == (2, 6)


def test_encode_messages(tokenizer, ids):
    tokens, lengths = text.encode(tokenizer, [[{"role": "user", "content": "hi"}]])
    np.testing.assert_array_equal(tokens, [ids("{u:hi}\n{a:")])
    np.testing.assert_array_equal(lengths, [10])


def test_encode_refuses(tokenizer, spaced):
    with pytest.raises(ValueError, match="prompt 1 has 4 tokens, more than the width 3"):
        text.encode(tokenizer, ["a", "abc"], width=3)
    with pytest.raises(ValueError, match=r"every prompt needs a token to continue from, got lengths \[2, 0\]"):
        text.encode(spaced, ["a", ""])
    with pytest.raises(ValueError, match=r"got lengths \[\]"):
        text.encode(tokenizer, [])


def test_decode(tokenizer, ids):
    tokens, mask = arrays(ids, ["^ab| cd$", "^a|b", "^|$", "^ab|c$d"])
    assert text.decode(tokenizer, tokens, mask) == [" cd", "b", "", "cd"]
    assert text.decode(tokenizer, jnp.asarray(tokens), jnp.asarray(mask)) == [" cd", "b", "", "cd"]


def test_decode_row_without_a_completion(tokenizer, ids):
    tokens, mask = arrays(ids, ["^ab|cd"])
    assert text.decode(tokenizer, tokens, mask & False) == [""]


def test_decode_reads_the_completion_off_the_mask_not_the_ids(tokenizer, ids):
    # EOS is BOS, as in stories260K, is in the prompt, and is what the rows are padded with.
    tokens, mask = arrays(ids, ["^ab|cd^", "^a|^"])
    tokens[~mask & (np.cumsum(mask, 1) > 0)] = 1
    assert text.decode(tokenizer, tokens, mask, eos_ids=(1, 2)) == ["cd", ""]


def test_eos_is_no_text_even_where_it_is_no_special_token(tokenizer, ids):
    tokens, mask = arrays(ids, ["^ab|cd;", "^ab|c;d"])
    assert text.decode(tokenizer, tokens, mask, eos_ids=ids(";")) == ["cd", "c;d"]


def test_decode_takes_what_a_tool_said_between(tokenizer, ids):
    tokens, mask = arrays(ids, ["^ab|cdefg$"])
    mask[0, 4:6] = False
    assert text.decode(tokenizer, tokens, mask) == ["cdefg"]


def test_decode_keeps_leading_spaces(spaced):
    tokens = np.array([spaced("ab  cd").input_ids])
    assert spaced.convert_ids_to_tokens(tokens[0].tolist()) == ["▁", "a", "b", "▁", "▁", "c", "d"]
    mask = np.arange(7)[None] >= 3
    assert text.decode(spaced, tokens, mask) == ["  cd"]
    assert spaced.decode(tokens[0, 3:]) == " cd"  # what decoding the completion by itself would lose


def test_decode_of_split_characters(bytewise):
    ids = bytewise("aé€", add_special_tokens=False).input_ids
    assert len(ids) == 6
    tokens = np.array([ids])
    for start, expected in ((1, "é€"), (2, "é€"), (3, "€")):  # a character belongs to the token that completes it
        assert text.decode(bytewise, tokens, np.arange(6)[None] >= start) == [expected]
    unfinished = (np.arange(6)[None] >= 1) & (np.arange(6)[None] < 5)
    assert text.decode(bytewise, tokens, unfinished) == ["é\ufffd"]


@pytest.mark.parametrize("shape", [(1, 3), (2,)])
def test_decode_refuses_other_shapes(tokenizer, shape):
    with pytest.raises(ValueError, match=r"must both be \[B, T\], got \(1, 2\) and"):
        text.decode(tokenizer, np.zeros((1, 2), int), np.zeros(shape, bool))


STOPS = {
    #                     row          stops          text     kept
    "one": ("^ab|cd;ef$", [";"], "cd", "...xxx..."),
    "none": ("^ab|cdef$", [";"], "cdef", "...xxxxx"),
    "of several tokens": ("^ab|c\n\nd$", ["\n\n"], "c", "...xxx.."),
    "the one that is complete first": ("^|abcd$", ["abc", "b"], "a", ".xx..."),
    "in the prompt only": ("^a;b|cd$", [";"], "cd", "....xxx"),
    "across the border": ("^a;|;cd$", [";;"], ";cd", "...xxxx"),
    "at once": ("^ab|;cd", [";"], "", "...x.."),
    "last": ("^ab|cd;", [";"], "cd", "...xxx"),
    "no stops": ("^ab|cd$", [], "cd", "...xxx"),
}


@pytest.mark.parametrize("row, stops, expected, kept", STOPS.values(), ids=STOPS)
def test_stop(tokenizer, ids, row, stops, expected, kept):
    tokens, mask = arrays(ids, [row, "^a|bcdefgh$"])
    before = mask.copy()
    texts, got = text.stop(tokenizer, tokens, mask, stops)
    assert texts[0] == expected
    np.testing.assert_array_equal(got[0, : len(kept)], [c == "x" for c in kept])
    assert not got[0, len(kept) :].any()
    np.testing.assert_array_equal(mask, before)


def test_stop_counts_the_token_that_completes_it(merging, ids):
    double = ids(" ")[0] + 1
    tokens, mask = np.array([[1, *ids("ab="), double, *ids("c")]]), np.array([[0, 0, 1, 1, 1, 1]], bool)
    texts, kept = text.stop(merging, tokens, mask, ["=="])
    assert texts == ["b"]
    np.testing.assert_array_equal(kept, [[0, 0, 1, 1, 1, 0]])


def test_stop_refuses_the_empty_string(tokenizer, ids):
    with pytest.raises(ValueError, match=r"an empty stop string would cut everything, got \['', 'a'\]"):
        text.stop(tokenizer, *arrays(ids, ["^ab|cd$"]), ["", "a"])


def test_stories_round_trip(shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260K-hf")
    prompts = ["Once upon a time", "  Two  spaces\n", "é and 日本"]
    tokens, lengths = text.encode(tokenizer, prompts)
    for prompt, row, length in zip(prompts, tokens, lengths):
        whole = np.array([[*row[:length], *tokenizer(prompt, add_special_tokens=False).input_ids, 1]])
        mask = np.arange(whole.shape[1])[None] >= length
        assert text.decode(tokenizer, whole, mask, eos_ids=(1, 2)) == [" " + prompt]


def test_one_text_is_not_a_sequence_of_stops(tokenizer):
    with pytest.raises(TypeError, match="stops='dog' is one text"):
        text.stop(tokenizer, [[5, 6]], [[0, 1]], "dog")
