"""Where rows come from: JSONL, JSON, Parquet and text files, folders of them, hub data sets, lists in memory.

`read` opens lazily and yields `Row`s. What a row means is the business of `formats`.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alignax.data.rows import Row

CONTAINERS = ("data", "rows", "examples")  # a .json file is a list of rows or an object with one of these
METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}


def read(source: Any, *, split: str | None = None, separator: str | None = "\n") -> Iterator[Row]:
    """The rows of a source, one by one.

    Args:
      source: a file (.jsonl, .json, .parquet, .txt, or one of the first two and .txt with .gz); a folder of such files
        (searched through, in the order of their names) or one written by `Dataset.save_to_disk`; the id of a data set
        on the Hugging Face hub; a `datasets` object; or any iterable of dicts.
      split: which split of a folder (files or subfolders whose name starts with it) or data set to read.
      separator: what separates the rows of a .txt file; None makes the whole file one row. Rows are `{"text": ...}`.

    Raises:
      FileNotFoundError: no such file, and not the id of a data set. ValueError: a broken line, an unknown kind of
      file, or no or several splits to choose from; the error names the file, line and choices.
    """
    if not isinstance(source, str | Path):
        return _read_object(source, split)
    path = Path(source)
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            import datasets

            return _read_object(datasets.load_from_disk(str(path)), split, name=str(path))
        return _read_folder(path, split, separator)
    if path.is_file():
        if split is not None:
            raise ValueError(f"{path} is one file and has no splits, got split={split!r}")
        return _named(path, _reader(path)(path, separator))
    return _read_hub(str(source), split)


def _named(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a file, with its name on what the readers of formats raise without it, and on having none."""
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read to its end: {error}") from error
    if empty:
        raise ValueError(f"{path}: no rows")


def _read_object(source: Any, split: str | None, name: str = "row") -> Iterator[Row]:
    if isinstance(source, dict):
        choices = sorted(source)
        if split is None and len(choices) == 1:
            split = choices[0]
        if split not in source:
            raise ValueError(f"{name}: no split {split!r}; choose one of {choices}")
        source = source[split]
    elif split is not None:
        raise ValueError(f"{name}: split={split!r} was asked of a source without splits")
    if not isinstance(source, Iterable):
        raise TypeError(f"expected a path, a hub id, a data set or an iterable of dicts, got {type(source).__name__}")
    arrow = type(source).__module__.split(".")[0] == "datasets"
    rows = (_without_fillers(fields) if arrow else fields for fields in source)
    return (_row(f"{name}[{i}]", fields) for i, fields in enumerate(rows))


def _without_fillers(fields: Any) -> Any:
    """A row without the nulls that Arrow puts into its messages and tools, where others have keys that these lack."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {name: clean(value) for name, value in fields.items()}


def _read_hub(name: str, split: str | None) -> Iterator[Row]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or Path(name).suffix in _READERS:
        raise FileNotFoundError(f"{name} does not exist")
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client has many; what matters is that there was no such data set for us
        raise FileNotFoundError(f"{name} is no file or folder here, nor a data set that loads: {error}") from error
    return _read_object(loaded, split, name=name)


def _read_folder(folder: Path, split: str | None, separator: str | None) -> Iterator[Row]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in METADATA]
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = [p for p in found if _suffix(p) in _READERS]
    if split is not None:
        files = [p for p in files if any(part.startswith(split) for part in p.relative_to(folder).parts)]
    if not files:
        wanted = "" if split is None else f" of split {split!r}"
        raise ValueError(f"{folder} has no {', '.join(_READERS)} file{wanted}; found {[p.name for p in found[:10]]}")
    return (row for path in files for row in _reader(path)(path, separator))


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _reader(path: Path) -> Any:
    if _suffix(path) not in _READERS or (path.suffix == ".gz" and _suffix(path) == ".parquet"):
        raise ValueError(f"{path}: unknown kind of file; expected one of {', '.join(_READERS)}")
    return _READERS[_suffix(path)]


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _row(where: str, value: Any) -> Row:
    if isinstance(value, str):
        return Row(where, {"text": value})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object or a text, got {type(value).__name__}")
    return Row(where, value)


def _parse(where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _read_jsonl(path: Path, separator: str | None) -> Iterator[Row]:
    del separator
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(f"{path}:{number}", _parse(f"{path}:{number}", line))


def _read_json(path: Path, separator: str | None) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read()
    try:
        value = _parse(str(path), data)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        yield from _read_jsonl(path, separator)  # many a .json on the hub holds JSON lines
        return
    if isinstance(value, dict):
        value = next((value[key] for key in CONTAINERS if key in value), value)
    if not isinstance(value, list):
        found = list(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}: expected a list of rows, or an object with one as {CONTAINERS}; found {found}")
    for index, fields in enumerate(value):
        yield _row(f"{path}[{index}]", fields)


def _read_parquet(path: Path, separator: str | None) -> Iterator[Row]:
    del separator
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.lib.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error})") from error
    with file:
        index = 0
        for batch in file.iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                yield _row(f"{path}[{index}]", _without_fillers(fields))
                index += 1


def _read_text(path: Path, separator: str | None) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    parts, line = [text] if separator is None else text.split(separator), 1
    for part in parts:
        if part.strip():
            yield Row(f"{path}:{line}", {"text": part})
        line += (part + (separator or "")).count("\n")


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".txt": _read_text}
