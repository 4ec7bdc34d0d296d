"""Data files as rows: json, jsonl, csv, tsv, parquet, txt; paths, globs, folders, and `file#500`."""

from __future__ import annotations

import csv
import difflib
import glob
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")


class RowError(ValueError):
    """A row that cannot be used; whoever knows the file adds its name and the row number."""


def expand(files: list[str]) -> Iterator[tuple[Path, int | None]]:
    """Every file that paths, globs and folders name, with the number of rows to take where ``path#500`` says one.

    Raises:
        FileNotFoundError: something matches nothing; names the nearest file.
    """
    for pattern in files:
        bare, mark, count = pattern.rpartition("#")
        pattern, limit = (bare, int(count)) if mark and count.isdigit() else (pattern, None)
        if _is_hub(pattern):
            yield Path(pattern), limit
            continue
        paths = [Path(pattern)] if Path(pattern).is_file() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if Path(pattern).is_dir():
            paths = sorted(p for p in Path(pattern).iterdir() if p.suffix.lower() in READERS)
        if not paths:
            near = difflib.get_close_matches(Path(pattern).name, _listing(Path(pattern).parent), 1)
            raise FileNotFoundError(
                f"There is no data file '{pattern}'" + (f"; did you mean {near[0]}?" if near else ".")
            )
        for path in paths:
            yield path, limit


def _listing(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


def read(path: Path) -> Iterator[Any]:
    """The rows of one file; a row that cannot be parsed comes as the ``RowError`` that says why.

    Raises:
        ValueError: an ending without a reader, or a file that cannot be parsed as a whole.
    """
    if _is_hub(str(path)):
        return _read_hub(str(path))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"'{path}' ends in '{path.suffix}'; data is read from {', '.join(READERS)} files.")
    return reader(path)


def _is_hub(name: str) -> bool:
    """``owner/name`` or ``owner/name:split``, where no such file or folder is."""
    bare = name.partition(":")[0]
    return not Path(bare).exists() and bool(HUB_NAME.fullmatch(name)) and Path(bare).suffix.lower() not in READERS


def _read_hub(name: str) -> Iterator[Any]:
    bare, _, split = name.partition(":")
    try:
        from datasets import load_dataset  # optional, slow to import, and only here
    except ImportError:
        raise ImportError(f"Reading '{name}' from the hub needs the package datasets: pip install datasets.") from None
    try:
        return iter(load_dataset(bare, split=split or "train"))
    except Exception as error:  # its errors have no common class
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"There is no file or folder '{bare}', and from the hub it cannot be read: {reason}") from None


def _read_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    yield RowError(f"not valid JSON ({error.msg} at column {error.colno})")


def _read_json(path: Path) -> Iterator[Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line under the ending .json
            return _read_jsonl(path)
        raise ValueError(f"{path}:{error.lineno}: this is not valid JSON ({error.msg}).") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(value) == 1 and lists else [value]
    return iter(value)


def _read_csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
            extra = row.pop(None, None)  # type: ignore[call-overload]
            yield RowError(f"the line has {len(extra)} fields too many") if extra else row


def _read_parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet  # type: ignore[import-untyped]  # optional, and only here

    for batch in parquet.ParquetFile(path).iter_batches(1024):
        yield from batch.to_pylist()


def _read_txt(path: Path) -> Iterator[Any]:
    for block in path.read_text(encoding="utf-8-sig").split("\n\n"):
        if block.strip():
            yield {"text": block.strip("\n")}


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
