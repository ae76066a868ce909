"""What is in data files: rows and columns, counted without keeping them."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatrain.errors import DataError
from megatrain.export.compare.describe import Description
from megatrain.export.compare.place import DATA_SUFFIXES, Place


def describe_data(place: Place) -> Description:
    """Describe a data file or a folder of them.  Raises DataError for one that cannot be read."""
    files = [place.path]
    if place.path.is_dir():
        files = sorted(path for path in place.path.rglob("*") if path.suffix in DATA_SUFFIXES)
    num_rows, columns = 0, dict[str, None]()
    for path in files:
        try:
            rows, names = _read(path)
        except (OSError, ValueError, csv.Error, pa.ArrowInvalid) as error:
            raise DataError(f"not a data file: {path}: {error}") from error
        num_rows += rows
        columns |= dict.fromkeys(names)
    facts = {
        "format": ", ".join(sorted({path.suffix[1:] for path in files})),
        "rows": num_rows,
        "columns": list(columns),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }
    return Description("dataset", str(place.path), facts)


def _read(path: Path) -> tuple[int, list[str]]:
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        return file.metadata.num_rows, list(file.schema_arrow.names)
    if path.suffix == ".arrow":
        return _read_arrow(path)
    rows = _ROWS[path.suffix](path)
    first = next(rows, None)
    if first is None:
        return 0, []
    return 1 + sum(1 for _ in rows), list(first) if isinstance(first, dict) else []


def _read_arrow(path: Path) -> tuple[int, list[str]]:
    with pa.memory_map(str(path)) as source:
        try:
            reader: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(source)
            count = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            return count, list(reader.schema.names)
        return sum(batch.num_rows for batch in reader), list(reader.schema.names)


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def _json(path: Path) -> Iterator[Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    yield from content if isinstance(content, list) else [content]


def _csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


_ROWS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
