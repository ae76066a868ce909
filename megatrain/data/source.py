"""From a DatasetMeta to rows: local files, the Hugging Face hub, or ModelScope's."""

import importlib
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from megatrain.data.files import KINDS, find_files
from megatrain.data.fingerprint import fingerprint
from megatrain.data.json_files import (
    ParseLines,
    check_lines,
    find_bad_bytes,
    find_own,
    is_array,
    read_array,
)
from megatrain.data.meta import DatasetMeta
from megatrain.data.mixing import chain
from megatrain.data.origin import Origins
from megatrain.data.rows import ROW_FEATURES
from megatrain.data.steps import LeftOut
from megatrain.data.table import Table, add_row_numbers, run_map, with_columns
from megatrain.errors import ConfigError, DataError

READ_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    pa.ArrowException,
    datasets.exceptions.DatasetsError,
)
"""What `datasets` and the readers under it raise for files that they cannot read."""


class Source:
    """Reads data sets into tables with a column of row numbers."""

    def __init__(
        self, origins: Origins, left_out: list[LeftOut], *, streaming: bool, on_error: str
    ) -> None:
        self._left_out = left_out
        self._origins, self._streaming, self._on_error = origins, streaming, on_error

    def read(self, meta: DatasetMeta) -> Table:
        """Return the chosen rows of `meta`.  Raises DataError, ConfigError."""
        scheme, _, name = str(meta.dataset_id).rpartition("://")
        if scheme not in ("", "hf", "ms"):
            raise ConfigError(
                f"unknown scheme {scheme!r} in {meta.dataset_id!r}",
                hint="known are hf:// and ms://",
            )
        path = Path(name).expanduser()
        if not scheme and path.exists():
            table = self._files(path, meta)
        elif scheme == "ms":
            table = self._files(_from_modelscope(name), meta)
        elif not scheme and _looks_local(name):
            raise DataError(f"no such file or folder: {name}", hint=f"from {Path.cwd()}")
        else:
            table = self._hub(name, meta)
        return self._slice(table, meta)

    def _files(self, path: Path, meta: DatasetMeta) -> Table:
        files = find_files(path, meta)
        tables = [self._file(file) for file in files]
        rows = chain(tables, [str(file) for file in files])
        if not self._streaming and not len(rows):
            raise DataError(f"{meta.describe()} has no rows", hint="give a file with rows")
        return rows

    def _file(self, path: Path) -> Table:
        kind = KINDS[path.suffix]
        if not path.stat().st_size:
            raise DataError(f"{path} is empty", hint="give a file with rows")
        is_json = kind in ("json", "jsonl")
        try:
            if kind == "json" and is_array(path):
                return self._array(path)
            if kind == "json":
                check_lines(path)
            if is_json:
                return self._lines(path)
            rows = self._load(kind, path)
        except READ_ERRORS as error:
            own = find_own(error) or (find_bad_bytes(path) if is_json or kind == "csv" else None)
            if own is not None:
                raise own from error
            cause = error.__cause__ or error
            raise DataError(
                f"cannot read {path}: {type(cause).__name__}: {cause}",
                hint=f"is it a {kind} file, whole and not compressed?",
            ) from error
        return add_row_numbers(rows, self._origins.add(str(path), "row"))

    def _load(self, builder: str, path: Path, **options: Any) -> Table:
        return with_columns(
            datasets.load_dataset(
                builder,
                data_files=[str(path)],
                split="train",
                streaming=self._streaming,
                **options,
            )
        )

    def _lines(self, path: Path) -> Table:
        start = self._origins.add(str(path), "line")
        text = datasets.Features({"text": datasets.Value("string")})
        rows = self._load("text", path, features=text)
        left_out = LeftOut(f"reading {path}")
        self._left_out.append(left_out)
        table = run_map(
            rows,
            ParseLines(path, start, self._on_error, left_out),
            ROW_FEATURES,
            what=fingerprint("lines", str(path), start, self._on_error),
            with_indices=True,
            description=f"reading {path.name}",
        )
        if not self._streaming:
            left_out.log()
        return table

    def _array(self, path: Path) -> Table:
        start = self._origins.add(str(path), "row")
        kind = datasets.IterableDataset if self._streaming else datasets.Dataset
        changed = path.stat().st_mtime_ns
        options: dict[str, Any] = {"gen_kwargs": {"path": path, "start": start}}
        if not self._streaming:
            options["fingerprint"] = fingerprint("array", str(path.resolve()), changed, start)
        return kind.from_generator(read_array, features=ROW_FEATURES, **options)

    def _hub(self, name: str, meta: DatasetMeta) -> Table:
        try:
            rows = with_columns(
                datasets.load_dataset(
                    name, meta.subset, split=meta.split, streaming=self._streaming
                )
            )
        except READ_ERRORS as error:
            raise DataError(
                f"cannot load {meta.describe()} from the hub: {type(error).__name__}: {error}",
                hint="give a file or a folder that exists, or check id, subset_name and split",
            ) from error
        return add_row_numbers(rows, self._origins.add(meta.describe(), "row"))

    def _slice(self, table: Table, meta: DatasetMeta) -> Table:
        if meta.data_slice is None:
            return table
        if isinstance(table, datasets.Dataset):
            chosen = meta.chosen_rows(len(table))
            if not chosen:
                raise _nothing_chosen(meta, f" of {len(table)} rows")
            return table.select(chosen)
        start, stop = _from_the_start(meta)
        if stop is not None and stop <= start:
            raise _nothing_chosen(meta, "")
        rows = table.skip(start)
        return rows if stop is None else rows.take(max(0, stop - start))


def _nothing_chosen(meta: DatasetMeta, of: str) -> DataError:
    return DataError(
        f"{meta.describe()}: data_slice={meta.data_slice!r} chooses none{of}",
        hint="rows are counted from 0",
    )


def _from_the_start(meta: DatasetMeta) -> tuple[int, int | None]:
    """Return where a slice of a stream starts and stops.  Raises ConfigError for other choices."""
    chosen = meta.data_slice
    if isinstance(chosen, range | slice):
        start, stop, step = chosen.start or 0, chosen.stop, chosen.step or 1
        if step == 1 and start >= 0 and (stop is None or stop >= 0):
            return start, stop
    raise ConfigError(
        "a stream is read from its start, so data_slice must be range(start, stop): got "
        f"{chosen!r}",
        hint="read it whole, without streaming=True",
    )


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix in KINDS or name.count("/") > 1


def _from_modelscope(name: str) -> Path:
    """Download a data set's files; none of its code is run."""
    try:
        hub: Any = importlib.import_module("modelscope")
    except ImportError as error:
        raise DataError(
            f"ms://{name} needs the package modelscope", hint="pip install modelscope"
        ) from error
    patterns = [f"*{suffix}" for suffix in KINDS]
    try:
        return Path(hub.dataset_snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise DataError(
            f"cannot download {name!r} from modelscope: {type(error).__name__}: {error}",
            hint="give a local file or folder, or check the id",
        ) from error
