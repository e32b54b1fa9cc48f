import pytest

from alignax.data import BadRow, Dropped, truncation


def test_slices():
    assert "abcdef"[truncation.keep_start("w", 6, 4)] == "abcd"
    assert "abcdef"[truncation.keep_end("w", 6, 4)] == "cdef"


def test_refusals_name_row_length_and_limit():
    with pytest.raises(BadRow, match="rows:3: longer than 4 tokens: it has 6") as error:
        truncation.refuse("rows:3", 6, 4)
    assert not isinstance(error.value, Dropped)
    with pytest.raises(Dropped, match="rows:3: longer than 4 tokens: it has 6"):
        truncation.drop("rows:3", 6, 4)
