import gzip
import json

import pytest

from alignax.data import Row, read

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "é\u2028b", "n": 2}, {"prompt": "c", "n": 3}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def fields(rows):
    return [row.fields for row in rows]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("content", [LINES, LINES + "\n", LINES.replace("\n", "\r\n"), "\ufeff" + LINES])
def test_jsonl(tmp_path, content):
    path = write(tmp_path, "rows.jsonl", content)
    assert list(read(path)) == [Row(f"{path}:{i}", row) for i, row in enumerate(ROWS, start=1)]


def test_jsonl_is_read_lazily_and_blank_lines_keep_the_count(tmp_path):
    path = write(tmp_path, "rows.jsonl", '{"a": 1}\n\n{"a": 2}\n{broken')
    rows = read(path)
    assert [next(rows).where, next(rows).where] == [f"{path}:1", f"{path}:3"]
    with pytest.raises(ValueError, match=r"rows\.jsonl:4: not valid JSON"):
        next(rows)


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[1, 2]", r"rows\.jsonl:2: expected an object or a text, got list"),
        (b"\xff\xfe", r"rows\.jsonl:2: not UTF-8"),
        (b'{"a": 1', r"rows\.jsonl:2: not valid JSON"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, line, message):
    path = write(tmp_path, "rows.jsonl", b'{"a": 1}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(read(path))


def test_gzip(tmp_path):
    assert fields(read(write(tmp_path, "rows.jsonl.gz", gzip.compress(LINES.encode())))) == ROWS


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps({"version": 1, "data": ROWS}, indent=2), LINES])
def test_json(tmp_path, content):
    path = write(tmp_path, "rows.json", content)
    assert fields(read(path)) == ROWS
    assert next(read(path)).where in (f"{path}[0]", f"{path}:1")


def test_json_of_texts(tmp_path):
    assert fields(read(write(tmp_path, "rows.json", '["a", "b"]'))) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}', r"expected a list of rows, or an object with one as .* found \['prompt'\]"),
        ("3", "expected a list of rows, .* found int"),
        ("[{]", "not valid JSON"),
        ('[{"a": 1}, 3]', r"rows\.json\[1\]: expected an object or a text, got int"),
    ],
)
def test_bad_json(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        list(read(write(tmp_path, "rows.json", content)))


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read(str(path))) == [Row(f"{path}[{i}]", row) for i, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match=r"bad\.parquet: not a Parquet file"):
        list(read(write(tmp_path, "bad.parquet", "PAR?")))


def test_nulls_that_arrow_fills_in_are_taken_out(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    calls = [{"name": name, "arguments": {name: 1}} for name in "ab"]
    rows = [{"messages": [{"role": "x", "content": None, "tool_calls": [call]}], "score": None} for call in calls]
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[0]["messages"][0]["tool_calls"][0]["arguments"] == {"a": 1, "b": None}
    parquet.write_table(table, path)
    expected = [{"messages": [{"role": "x", "tool_calls": [call]}], "score": None} for call in calls]
    assert fields(read(path)) == expected
    assert fields(read(datasets.Dataset(table))) == expected


def test_text_by_line_by_paragraph_and_whole(tmp_path):
    path = write(tmp_path, "some.txt", "one\ntwo\n\n\nthree\n")
    assert list(read(path)) == [Row(f"{path}:{n}", {"text": t}) for n, t in ((1, "one"), (2, "two"), (5, "three"))]
    paragraphs = list(read(path, separator="\n\n"))
    assert [row.where for row in paragraphs] == [f"{path}:1", f"{path}:4"]
    assert fields(paragraphs) == [{"text": "one\ntwo"}, {"text": "\nthree\n"}]
    assert fields(read(path, separator=None)) == [{"text": "one\ntwo\n\n\nthree\n"}]


def test_folder(tmp_path):
    write(tmp_path, "b/test.jsonl", '{"n": 3}')
    write(tmp_path, "train-00001.jsonl", '{"n": 2}')
    write(tmp_path, "train-00000.json", '[{"n": 1}]')
    write(tmp_path, ".cache/train.jsonl", '{"n": 9}')
    write(tmp_path, "README.md", "no data")
    write(tmp_path, "dataset_infos.json", '{"n": 9}')
    assert fields(read(tmp_path)) == [{"n": 3}, {"n": 1}, {"n": 2}]
    assert fields(read(tmp_path, split="train")) == [{"n": 1}, {"n": 2}]
    with pytest.raises(ValueError, match=r"no .* file of split 'validation'; found"):
        read(tmp_path, split="validation")


def test_datasets_objects_and_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert fields(read(data)) == ROWS
    both = datasets.DatasetDict({"train": data, "test": data.select([2])})
    assert fields(read(both, split="test")) == ROWS[2:]
    with pytest.raises(ValueError, match=r"no split None; choose one of \['test', 'train'\]"):
        read(both)
    data.save_to_disk(tmp_path / "saved")
    rows = list(read(tmp_path / "saved"))
    assert fields(rows) == ROWS and rows[1].where == f"{tmp_path / 'saved'}[1]"


def test_rows_in_memory():
    assert list(read(ROWS)) == [Row(f"row[{i}]", row) for i, row in enumerate(ROWS)]
    with pytest.raises(ValueError, match="without splits"):
        read(ROWS, split="train")
    with pytest.raises(TypeError, match="iterable of dicts, got int"):
        read(3)


@pytest.mark.parametrize("name", ["absent.jsonl", "no/such/folder/rows.json", "/absent/folder"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(name)


def test_unreachable_data_set_is_an_error_that_names_it():
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="nobody/no-such-data is no file or folder here"):
        read("nobody/no-such-data")


def test_unknown_kind_of_file(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.csv: unknown kind of file; expected one of \.jsonl"):
        read(write(tmp_path, "rows.csv", "a,b"))
    with pytest.raises(ValueError, match="is one file and has no splits, got split='train'"):
        read(write(tmp_path, "rows.jsonl", "{}"), split="train")


def test_real_files(shared):
    counts = {
        "gsm8k/train.jsonl": 7473,
        "llamafactory/dpo_en_demo.json": 300,
        "bbh/boolean_expressions.json": 250,
        "corpora/tinystories_2.json": 2,
        "corpora/names.txt": 32033,
    }
    assert {name: sum(1 for _ in read(shared / "data" / name)) for name in counts} == counts


@pytest.mark.parametrize("name, content", [("a.jsonl", b""), ("a.json", b"[]"), ("a.txt", b"")])
def test_a_file_without_rows_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: no rows"):
        list(read(tmp_path / name))


@pytest.mark.parametrize("keep", [2, 40])
def test_a_gzip_file_that_is_cut_off_is_named(tmp_path, keep):
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(500)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:keep])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: cannot be read to its end"):
        list(read(tmp_path / "a.jsonl.gz"))
