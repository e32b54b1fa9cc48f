"""Text for libraries that take nothing else: words of one token each, and their tokenizer."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ...; the last three ids are <pad>, <eos> and <bos>, and no text gets one of its own accord."""
    words = {f"w{i}": i for i in range(vocab - 3)}
    words |= {token: len(words) + i for i, token in enumerate(("<pad>", "<eos>", "<bos>"))}
    model = Tokenizer(models.WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def text(vocab: int, count: int) -> str:
    """`count` random words."""
    return " ".join(f"w{random.randrange(vocab - 3)}" for _ in range(count))
