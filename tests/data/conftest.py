"""Tokenizers small enough to write their ids out by hand: one character, one token."""

import pathlib
import re
import string

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|start|>", "<|end|>"]
CHARACTERS = "\n" + string.printable[:95]  # digits, letters, punctuation, space: ids from 5
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role[0] }}:{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>a:{% endif %}"
)
TEMPLATES = {path.stem: path.read_text() for path in (pathlib.Path(__file__).parent / "templates").glob("*.jinja")}


def build(vocabulary, merges=(), *, bos=True, special=SPECIAL, normalizer=None, pre_tokenizer=None, decoder=None):
    """A fast tokenizer whose ids are the special tokens, then the vocabulary in order, then what the merges make."""
    entries = list(special) + list(vocabulary) + [left + right for left, right in merges]
    model = models.BPE({entry: i for i, entry in enumerate(entries)}, list(merges), unk_token="<unk>")
    core = Tokenizer(model)
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = decoder or decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(special[3:]),
    )


@pytest.fixture(scope="session")
def ids():
    """The ids of a text, one per character; `^` is BOS and `$` EOS, `{` and `}` open and close a turn."""
    special = {"^": 1, "$": 2, "{": 3, "}": 4}
    return lambda text: [special.get(c, 5 + CHARACTERS.index(c)) for c in text]


@pytest.fixture(scope="session")
def tokenizer():
    """One character, one token; adds BOS; has a chat template."""
    made = build(CHARACTERS)
    made.chat_template = CHATML
    return made


@pytest.fixture(scope="session")
def merging():
    """The same with the token "==" besides, which may span the border of prompt and completion."""
    return build(CHARACTERS, [("=", "=")])


@pytest.fixture(scope="session")
def spaced():
    """As SentencePiece: a space is put before every text, and taken away in decoding. No BOS."""
    return build(
        CHARACTERS.replace(" ", "") + "▁",
        [("=", "=")],
        bos=False,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    )


@pytest.fixture(scope="session")
def bytewise():
    """One byte, one token."""
    return build(
        sorted(pre_tokenizers.ByteLevel.alphabet()),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoder=decoders.ByteLevel(),
    )


@pytest.fixture(scope="session")
def family():
    """Tokenizers of one character a token with the chat template of a family of models, and its special tokens."""
    made = {}

    def get(name):
        if name not in made:
            found = re.findall(r"<\|\w+\|>|<(?:start|end)_of_turn>|\[/?INST\]", TEMPLATES[name])
            found += ["<|user|>", "<|assistant|>"] if name == "phi3" else []
            made[name] = build(CHARACTERS, special=[*SPECIAL[:3], *dict.fromkeys(found)])
            made[name].chat_template = TEMPLATES[name]
        return made[name]

    return get
