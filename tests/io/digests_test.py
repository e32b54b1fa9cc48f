"""Digests against a loop over the elements in Python's integers; what changes them and what does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.io import digests


def mix(word):
    """The last step of MurmurHash3, on 32 bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * factor % 2**32
    return word ^ (word >> 16)


def expected(words):
    return sum(mix((word + i * 0x9E3779B9) % 2**32) for i, word in enumerate(words)) % 2**32


def words_of(array):
    """The elements' bits as integers below 2^32, little end first; two for each of 8 bytes."""
    raw = np.asarray(array).tobytes()
    size = min(np.asarray(array).dtype.itemsize, 4)
    return [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]


ARRAYS = {
    "float32": np.linspace(-2, 2, 15, dtype=np.float32).reshape(3, 5),
    "bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "int8": np.arange(-3, 4, dtype=np.int8),
    "bool": np.array([True, False, True]),
    "float64": np.array([1.0, -2.5]),
    "complex64": np.array([1 + 2j, 3], np.complex64),
    "scalar": np.float32(0.1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_digests_are_the_sums_of_a_loop(name):
    assert digests.digests({"x": ARRAYS[name]}) == {"x": expected(words_of(ARRAYS[name]))}


def test_large_arrays_are_summed_by_the_device():
    large = np.random.default_rng(0).normal(size=(300, 400)).astype(np.float32)
    changed = large.copy()
    changed[299, 17] = np.nextafter(changed[299, 17], 9)  # one bit
    found = digests.digests({"host": large, "device": jnp.asarray(large), "changed": jnp.asarray(changed)})
    assert found["host"] == found["device"] != found["changed"]


def test_keys_empty_arrays_and_order():
    key = jax.random.key(7)
    found = digests.digests({"key": key, "data": jax.random.key_data(key), "none": jnp.zeros((0, 3))})
    assert found["key"] == found["data"] and found["none"] == 0
    found = digests.digests({"a": np.array([1, 2]), "b": np.array([2, 1])})
    assert found["a"] != found["b"]


def test_a_tree_is_more_than_its_leaves():
    tree = {"tokens": [np.arange(3), np.arange(2)], "name": "a", "rate": 0.5}
    same = {"tokens": [np.arange(3), np.arange(2)], "name": "a", "rate": 0.5}
    others = [tree | {"name": "b"}, tree | {"rate": 0.25}, tree | {"tokens": [np.arange(2), np.arange(3)]}]
    assert digests.of_tree(tree) == digests.of_tree(same)
    assert len({digests.of_tree(other) for other in [tree, *others, {"x": tree}]}) == 5
