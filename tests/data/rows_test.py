import subprocess
import sys
from collections import Counter

import pytest

from alignax.data import BadRow, Dropped, collect, split, summary


def _even(number):
    if number == 7:
        raise Dropped("file:7", "unlucky")
    if number % 2:
        raise BadRow(f"file:{number}", "odd", "expected an even one")
    return number * 10


def test_collect_raises_at_the_first_bad_row():
    with pytest.raises(BadRow, match=r"^file:3: odd: expected an even one$"):
        collect(_even, [2, 3, 5])


def test_collect_counts_what_it_drops():
    assert collect(_even, [1, 2, 3, 4, 7], drop=True) == ([20, 40], Counter(odd=2, unlucky=1))


def test_dropped_is_counted_even_where_bad_rows_raise():
    assert collect(_even, [7, 2]) == ([20], Counter(unlucky=1))


def test_other_errors_are_never_swallowed():
    with pytest.raises(ZeroDivisionError):
        collect(lambda x: 1 // x, [0], drop=True)


def test_summary():
    line = summary([1, 2], Counter(odd=1, unlucky=3))
    assert line == "6 rows read, 2 kept, 4 dropped (3 unlucky, 1 odd)"
    assert summary([1], Counter()) == "1 rows read, 1 kept, 0 dropped"


def test_split_is_a_partition_that_depends_on_the_seed_alone():
    rows = [f"row {i}" for i in range(100)]
    train, held_out = split(rows, 0.1, seed=3)
    assert len(held_out) == 10 and sorted(train + held_out) == sorted(rows)
    assert (train, held_out) == split(rows, 0.1, seed=3)
    assert held_out != split(rows, 0.1, seed=4)[1]
    assert held_out == sorted(held_out, key=rows.index)


def test_split_edges():
    assert split([1, 2, 3], 0.0) == ([1, 2, 3], [])
    assert len(split(list(range(5)), 0.01)[1]) == 1
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1\.5"):
        split([1, 2], 1.5)
    with pytest.raises(ValueError, match="cannot hold out 1 of 1"):
        split([1], 0.5)


def test_importing_data_loads_no_data_set_library():
    heavy = "{'datasets', 'pyarrow', 'transformers', 'torch'}"
    code = f"import sys, alignax.data; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)
