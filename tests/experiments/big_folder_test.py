"""A model larger than half of what a process may take is loaded onto a mesh, in a process that has that limit."""

import re

import big_folder


def test_a_folder_of_200_megabytes_is_loaded_under_a_limit_of_300(tmp_path):
    big_folder.make_folder(tmp_path / "model", 200)
    said = big_folder.load_under_limit(tmp_path / "model", 300)
    found = re.search(r"model (\d+) MB, used (\d+) MB, of 300 MB", said)
    assert found, said
    model, used = map(int, found.groups())
    assert 195 <= model <= 205 and used >= model  # the devices' memory counts: the limit is one
