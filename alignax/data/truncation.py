"""What becomes of a row longer than the limit: a function of (where, length, limit) to the slice of it to keep.

Called only for rows that are too long. Both sides of a pair are cut by the same slice, so that they keep one prompt;
`length` is then the longer side's.
"""

from alignax.data.rows import BadRow, Dropped


def keep_start(where: str, length: int, limit: int) -> slice:
    """The first `limit` tokens: a completion without its end and EOS, a prompt without what asks for the reply."""
    del where, length
    return slice(0, limit)


def keep_end(where: str, length: int, limit: int) -> slice:
    """The last `limit` tokens: a prompt without its beginning, nor its BOS."""
    del where
    return slice(length - limit, length)


def drop(where: str, length: int, limit: int) -> slice:
    """No row at all: `collect` leaves it out and counts it."""
    raise Dropped(where, f"longer than {limit} tokens", f"it has {length}")


def refuse(where: str, length: int, limit: int) -> slice:
    """An error naming the row."""
    raise BadRow(where, f"longer than {limit} tokens", f"it has {length}")
