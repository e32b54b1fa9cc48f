"""Between texts and the arrays the sampler takes and gives: encode prompts, decode completions, cut at stop strings.

A completion's text is what decoding the whole row adds to decoding its prompt. Decoding the completion by itself would
lose a leading space with SentencePiece, and split characters whose bytes are several tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from alignax.data.messages import Content, shared_length
from alignax.data.tokens import Tokenizer, encode_prompt


def encode(
    tokenizer: Tokenizer, prompts: Sequence[Content], *, width: int | None = None, pad_id: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, P], lengths int32 [B]) of texts or messages, padded on the right.

    Args:
      tokenizer: adds BOS if it is one that does; messages go through its chat template, up to the reply.
      prompts: B of them.
      width: P; None: the longest prompt's. A longer prompt is an error.
      pad_id: fills up the rows.
    """
    ids = [encode_prompt(tokenizer, prompt, where=f"prompt {i}") for i, prompt in enumerate(prompts)]
    lengths = np.array([len(row) for row in ids], np.int32)
    if not len(ids) or not lengths.all():
        raise ValueError(f"every prompt needs a token to continue from, got lengths {lengths.tolist()}")
    width = int(lengths.max()) if width is None else width
    if lengths.max() > width:
        raise ValueError(f"prompt {lengths.argmax()} has {lengths.max()} tokens, more than the width {width}")
    tokens = np.full((len(ids), width), pad_id, np.int32)
    for row, prompt in zip(tokens, ids):
        row[: len(prompt)] = prompt
    return tokens, lengths


def decode(
    tokenizer: Tokenizer, tokens: ArrayLike, mask: ArrayLike, *, eos_ids: Sequence[int] | None = None
) -> list[str]:
    """The completions of rows such as the sampler returns, one text for each.

    Args:
      tokens: [B, T], rows of prompt, completion and padding.
      mask: [B, T], the completion's own tokens; from the first to the last of them is its text (what a tool said
        between them too). A row without any gives "".
      eos_ids: not part of the text where they come last; None: the tokenizer's EOS. No special token ever is.
      tokenizer: decodes; bytes that do not yet make a character come out as U+FFFD.
    """
    return [_decode(tokenizer, *row) for row in _completions(tokenizer, tokens, mask, eos_ids)]


def stop(
    tokenizer: Tokenizer,
    tokens: ArrayLike,
    mask: ArrayLike,
    stops: Sequence[str],
    *,
    eos_ids: Sequence[int] | None = None,
) -> tuple[list[str], np.ndarray]:
    """The texts of `decode` cut before the first stop string in each, and the mask of the tokens kept.

    A row keeps the tokens up to the one that completes the stop string: the policy chose it, as it chooses an EOS, and
    is trained on it. What it wrote after that counts for nothing. Arguments as in `decode`.
    """
    if isinstance(stops, str):
        raise TypeError(f"stops={stops!r} is one text; expected a sequence of them")
    if not all(stops):
        raise ValueError(f"an empty stop string would cut everything, got {list(stops)}")
    texts, kept = [], np.array(mask, bool)
    for row, (ids, start) in enumerate(_completions(tokenizer, tokens, mask, eos_ids)):
        text = _decode(tokenizer, ids, start)
        if any(s in text for s in stops):
            end = _completed(tokenizer, ids, start, stops)
            kept[row, end:] = False
            text = _decode(tokenizer, ids[:end], start)
            text = text[: min(text.find(s) for s in stops if s in text)]
        texts.append(text)
    return texts, kept


def _completions(
    tokenizer: Tokenizer, tokens: ArrayLike, mask: ArrayLike, eos_ids: Sequence[int] | None
) -> list[tuple[list[int], int]]:
    # Each row up to the end of its text, and where its completion starts.
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    if tokens.shape != mask.shape or tokens.ndim != 2:
        raise ValueError(f"tokens and mask must both be [B, T], got {tokens.shape} and {mask.shape}")
    eos = {tokenizer.eos_token_id} if eos_ids is None else set(eos_ids)
    out = []
    for ids, own in zip(tokens.tolist(), mask):
        start, end = (int(own.argmax()), len(ids) - int(own[::-1].argmax())) if own.any() else (0, 0)
        out.append((ids[: end - 1] if end > start and ids[end - 1] in eos else ids[:end], start))
    return out


def _decode(tokenizer: Tokenizer, ids: list[int], start: int) -> str:
    head, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids[:start], ids)
    )
    # A prompt cut within a character decodes to U+FFFD there, the whole row does not.
    return whole[shared_length(head, whole) :]


def _completed(tokenizer: Tokenizer, ids: list[int], start: int, stops: Sequence[str]) -> int:
    # The least length at which the decoded completion holds a stop string, by bisection.
    low, high = start + 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = _decode(tokenizer, ids[:middle], start)
        low, high = (low, middle) if any(s in text for s in stops) else (middle + 1, high)
    return low
