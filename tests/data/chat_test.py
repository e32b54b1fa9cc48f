import copy

import pytest

from alignax.data import BadRow, chat

ASK = "{% if add_generation_prompt %}a:{% endif %}"


def talk(*contents):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents)]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def mask(line):
    return [c == "x" for c in line]


def test_encode(tokenizer, ids):
    assert chat.encode(tokenizer, talk("hi")) == ids("{u:hi}\n")
    assert chat.encode(tokenizer, talk("hi"), reply=True) == ids("{u:hi}\n{a:")


@pytest.mark.parametrize("first", [0, 2, 3])
def test_turns(tokenizer, ids, first):
    rendered = "{u:hi}|{a:yo}|{u:why?}|{a:snow}|"  # where | is a line end
    last_one = "                          xxxxx "
    both_one = "          xxx             xxxxx "
    got = chat.encode_turns(tokenizer, talk("hi", "yo", "why?", "snow"), first=first)
    assert got == (ids(rendered.replace("|", "\n")), mask(last_one if first else both_one))


def test_turn_without_a_closing_token_runs_to_the_end(tokenizer, ids):
    plain = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}" + ASK
    got = chat.encode_turns(with_template(tokenizer, plain), talk("hi", "yo", "oh", "ah"), first=0)
    assert got == (ids("u:hi\na:yo\nu:oh\na:ah\n"), mask(".......xxx.......xxx"))


def test_generation_blocks_are_the_turns(tokenizer, ids):
    # Without the blocks this template has no prefixes: it leaves the first answer out once another follows.
    marked = (
        "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content if loop.last else '-' }}!{% endgeneration %}{% endif %}{{ '\n' }}{% endfor %}"
    ) + ASK
    marked = with_template(tokenizer, marked)
    messages = talk("hi", "yo", "oh", "ah")
    text = ids("u:hi\na:-!\nu:oh\na:ah!\n")
    assert chat.encode_turns(marked, messages, first=0) == (text, mask(".......xx........xxx."))
    assert chat.encode_turns(marked, messages, first=3) == (text, mask("." * 17 + "xxx."))


def test_template_that_is_no_prefix_names_row_and_token(tokenizer):
    # As reasoning models do: the prompt that asks for an answer opens a thought that the finished answer does not have.
    thinking = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}" + ASK.replace("a:", "a:#")
    with pytest.raises(
        BadRow,
        match=r"^file:9: template is no prefix: rendered up to message 1, token 7 is \['#'\], but \['y'\] in the whole",
    ):
        chat.encode_turns(with_template(tokenizer, thinking), talk("hi", "yo"), first=1, where="file:9")


def test_template_that_changes_earlier_turns(tokenizer):
    hiding = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last or m.role == 'user' else '-' }}\n{% endfor %}"
    )
    hiding = with_template(tokenizer, hiding + ASK)
    chat.encode_turns(hiding, talk("hi", "yo", "oh", "ah"), first=3)
    with pytest.raises(BadRow, match=r"up to message 2, token 7 is \['y'\], but \['-'\]"):
        chat.encode_turns(hiding, talk("hi", "yo", "oh", "ah"), first=0)


def test_border_that_a_token_spans_is_refused(merging):
    glued = with_template(merging, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(BadRow, match=r"up to message 1, token 1 is \['='\], but \['=='\]"):
        chat.encode_turns(glued, talk("a=", "=b"), first=1)


@pytest.mark.parametrize("spelled", ["<|end|>", "</s>", "<s>", "<|start|>"])
def test_special_token_in_a_message_is_refused(tokenizer, spelled):
    with pytest.raises(BadRow, match=r"^file:9: special token in a message: the assistant's message contains"):
        chat.encode_turns(tokenizer, talk("hi", f"yo{spelled}"), where="file:9")


def test_template_that_refuses(tokenizer):
    strict = with_template(tokenizer, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRow, match=r"template refused: messages of \['user'\]: roles must alternate"):
        chat.encode(strict, talk("hi"))


def test_no_reply(tokenizer):
    with pytest.raises(BadRow, match="no message of the assistant to train on"):
        chat.encode_turns(tokenizer, talk("hi"))


def test_no_template(merging):
    with pytest.raises(ValueError, match="the tokenizer has no chat template: set"):
        chat.encode(merging, talk("hi"))


def test_a_generation_block_that_leaves_out_the_end_of_the_turn(tokenizer, ids):
    """The special token behind the block is trained on all the same, and nothing is put behind what follows it."""
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = (
        "{% for m in messages %}<|start|>{{ m.role[0] }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    )
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens, mask = chat.encode_turns(marked, talk)
    assert tokens == ids("{u:a}\n{a:b}\n")
    assert [token for token, on in zip(tokens, mask) if on] == ids("b}")
