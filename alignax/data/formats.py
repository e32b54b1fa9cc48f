"""What a row means: the field's formats, each a function from a `Row` to an `Example`, a `Pair` or a `Prompt`.

`parse` picks the format by the columns of the first row, or takes the one it is given. The prompt and the completions
of a row are all texts, or all lists of messages. Beside messages, the column `tools` lists what the assistant may call,
and `system` is what comes first. Columns that a format does not use stay with the row, for rewards and weights.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

from alignax.data.messages import Content, Message, read_content, read_messages, read_text, said, shared_length
from alignax.data.rows import BadRow, Row, collect
from alignax.data.tools import Tool, read_tools


class Example(NamedTuple):
    """A completion to imitate. A plain text is a completion of the empty prompt."""

    where: str
    prompt: Content
    completion: Content
    columns: dict[str, Any]
    tools: list[Tool] | None = None


class Pair(NamedTuple):
    """Two completions of one prompt, the first preferred."""

    where: str
    prompt: Content
    chosen: Content
    rejected: Content
    columns: dict[str, Any]
    tools: list[Tool] | None = None


class Prompt(NamedTuple):
    """A prompt to sample from; `columns` go to the reward."""

    where: str
    prompt: Content
    columns: dict[str, Any]
    tools: list[Tool] | None = None


Format = Callable[[Row], Any]


def text(row: Row) -> Example:
    """`text`: every token is trained on."""
    (body,), columns = _take(row, "text")
    return Example(row.where, "", read_text(row, "text", body), columns)


def prompt_completion(row: Row) -> Example:
    """`prompt`, `completion`: texts (joined as they are, nothing in between) or messages."""
    (prompt, completion), columns = _take(row, "prompt", "completion")
    prompt, completion = read_content(row, "prompt", prompt), read_content(row, "completion", completion)
    prompt, (completion,) = _match(row, prompt, completion)
    return Example(row.where, prompt, completion, columns, _tools(row, prompt, columns))


def instruction(row: Row) -> Example:
    """`instruction`, `input` and `system` (both may be empty or absent), `output`: one question and its answer."""
    (request, output), columns = _take(row, "instruction", "output")
    request, given = read_text(row, "instruction", request), columns.pop("input", None)
    request = f"{request}\n{read_text(row, 'input', given)}" if given else request
    talk = _with_system(row, [said("user", request)], columns)
    reply = [said("assistant", read_text(row, "output", output))]
    return Example(row.where, talk, reply, columns, _tools(row, talk, columns))


def messages(row: Row) -> Example:
    """`messages`, or ShareGPT's `conversations`: the completion is the last message, the assistant's.

    Where that one goes on from what tools said, the completion starts with the assistant's message that called them.
    """
    (value,), columns = _take(row, "conversations" if "conversations" in row.fields else "messages")
    talk = _with_system(row, read_messages(row, "messages", value), columns)
    if talk[-1]["role"] != "assistant":
        raise BadRow(row.where, "no reply", f"the last of {len(talk)} messages is the {talk[-1]['role']}'s")
    start = len(talk) - 1
    while start and (talk[start - 1].get("tool_calls") or "tool" in (talk[start - 1]["role"], talk[start]["role"])):
        start -= 1
    if all(message["role"] == "system" for message in talk[:start]):
        raise BadRow(row.where, "empty prompt", "nothing comes before the assistant's first message")
    return Example(row.where, talk[:start], talk[start:], columns, _tools(row, talk, columns))


def prompts(row: Row) -> Prompt:
    """`prompt`: a text, or messages that end before the assistant's."""
    (prompt,), columns = _take(row, "prompt")
    prompt = read_content(row, "prompt", prompt)
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BadRow(row.where, "prompt already answered", "its last message is the assistant's")
    return Prompt(row.where, prompt, columns, _tools(row, prompt, columns))


def pairs(row: Row, *, marker: str = "\n\nAssistant:") -> Pair:
    """`chosen`, `rejected`, and a prompt, explicit (`prompt`, or ShareGPT's `conversations`) or implicit.

    In messages, what chosen and rejected both start with belongs to the prompt; it may repeat the explicit one. In
    texts without an explicit prompt, the prompt is what both start with up to the last `marker`, as in hh-rlhf; texts
    that share no marker are refused, since where their prompt ends would be a guess.
    """
    explicit = next(([name] for name in ("prompt", "conversations") if name in row.fields), [])
    (chosen, rejected, *given), columns = _take(row, "chosen", "rejected", *explicit)
    chosen, rejected = read_content(row, "chosen", chosen), read_content(row, "rejected", rejected)
    prompt = read_content(row, "prompt", given[0]) if explicit else None
    if chosen == rejected:
        raise BadRow(row.where, "chosen equals rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        common = shared_length(chosen, rejected)
        shared, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        before = [said("user", prompt)] if isinstance(prompt, str) else prompt or []
        repeated = before == shared[: len(before)] or prompt in [message["content"] for message in shared]
        prompt = shared if repeated else before + shared
    elif prompt is None:
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise BadRow(
                row.where, "wrong type", "without a prompt, chosen and rejected are both texts or both messages"
            )
        common = chosen[: shared_length(chosen, rejected)]
        end = common.rfind(marker) + len(marker) if marker in common else 0
        prompt, chosen, rejected = common[:end], chosen[end:], rejected[end:]
    elif isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if chosen.startswith(prompt) and rejected.startswith(prompt):  # both sides repeat the explicit prompt
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt:
        raise BadRow(
            row.where, "no prompt", f"no prompt column, and chosen and rejected share no message or {marker!r}"
        )
    prompt, (chosen, rejected) = _match(row, prompt, chosen, rejected)
    if explicit == ["conversations"] and isinstance(prompt, list):
        prompt = _with_system(row, prompt, columns)
    return Pair(row.where, prompt, chosen, rejected, columns, _tools(row, prompt, columns))


# A row is in the first format all of whose columns it has.
KNOWN: tuple[tuple[tuple[str, ...], Format], ...] = (
    (("chosen", "rejected"), pairs),
    (("messages",), messages),
    (("conversations",), messages),
    (("prompt", "completion"), prompt_completion),
    (("instruction", "output"), instruction),
    (("text",), text),
    (("prompt",), prompts),
)


def detect(row: Row) -> Format:
    """The format that the row's columns spell."""
    for columns, format in KNOWN:
        if all(column in row.fields for column in columns):
            return format
    known = "; ".join(", ".join(columns) for columns, _ in KNOWN)
    raise BadRow(row.where, "unknown format", f"found {sorted(row.fields)}, expected one of: {known}")


def rename(row: Row, columns: dict[str, str]) -> Row:
    """The row with columns renamed, such as `{"question": "prompt"}`; an absent column or a taken name is an error."""
    missing = [old for old in columns if old not in row.fields]
    if missing:
        raise BadRow(row.where, "missing field", f"expected {missing} to rename, found {sorted(row.fields)}")
    fields = {name: value for name, value in row.fields.items() if name not in columns}
    for old, new in columns.items():
        if new in fields:
            raise BadRow(row.where, "column exists", f"renaming {old!r} would overwrite {new!r}")
        fields[new] = row.fields[old]
    return Row(row.where, fields)


def parse(
    rows: Iterable[Row],
    format: Format | None = None,
    *,
    columns: dict[str, str] | None = None,
    drop: bool = False,
    note: Callable[[BadRow], None] | None = None,
) -> tuple[list, Counter[str]]:
    """The rows as `Example`s, `Pair`s or `Prompt`s, and how many were left out, by reason.

    Args:
      rows: from `read`.
      format: one of this module's functions or the user's own; None: the one that the first row's columns spell.
      columns: old name to new name, applied first.
      drop: False raises `BadRow` at the first bad row (a missing field, an empty prompt or completion, a pair whose
        sides are equal, ...); True leaves such rows out and counts them.
      note: is given the error of each row left out.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise ValueError("the source has no rows")
    format = format or detect(rename(first, columns or {}))
    return collect(lambda row: format(rename(row, columns or {})), chain([first], rows), drop=drop, note=note)


def _take(row: Row, *names: str) -> tuple[list, dict[str, Any]]:
    if any(name not in row.fields for name in names):
        raise BadRow(row.where, "missing field", f"expected {list(names)}, found {sorted(row.fields)}")
    return [row.fields[name] for name in names], {k: v for k, v in row.fields.items() if k not in names}


def _with_system(row: Row, talk: list[Message], columns: dict[str, Any]) -> list[Message]:
    # ShareGPT and LLaMA-Factory keep it beside the conversation.
    value = columns.pop("system", None)
    return [said("system", read_text(row, "system", value)), *talk] if value else talk


def _tools(row: Row, prompt: Content, columns: dict[str, Any]) -> list[Tool] | None:
    # Beside a text the column is anything the user likes.
    return read_tools(row, columns) if isinstance(prompt, list) else None


def _match(row: Row, prompt: Content, *completions: Content) -> tuple[Content, list[Content]]:
    # All texts or all messages; no completion empty (a prompt cut out of it leaves nothing) or somebody else's.
    if all(isinstance(side, str) for side in (prompt, *completions)):
        return prompt, [read_text(row, "completion", completion) for completion in completions]
    talks: list[Content] = []
    for completion in completions:
        talk = [said("assistant", completion)] if isinstance(completion, str) else completion
        roles = [message["role"] for message in talk]
        if not roles or roles[0] != "assistant" or roles[-1] != "assistant":
            raise BadRow(row.where, "no reply", f"a completion must start and end with the assistant's, got {roles}")
        talks.append(talk)
    return [said("user", prompt)] if isinstance(prompt, str) else prompt, talks
