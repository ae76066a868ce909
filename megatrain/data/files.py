"""Which local files a data set is made of."""

import re
from pathlib import Path

from megatrain.data.meta import DatasetMeta
from megatrain.errors import ConfigError, DataError

KINDS = {
    ".jsonl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""Suffix -> kind of file."""

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
"""Word in a file's or folder's name -> split, as `datasets` has it."""


def find_files(path: Path, meta: DatasetMeta) -> list[Path]:
    """Return the files under `path` that hold the split, in the order of their names.

    Raises DataError if there are none or of several kinds, ConfigError where a subset or a split
    is asked of a single file.
    """
    if path.is_file():
        _check_file(path, meta)
        return [path]
    if meta.subset:
        path = path / meta.subset
        if not path.is_dir():
            raise DataError(
                f"{path.parent} has no folder for the subset {meta.subset!r}",
                hint=f"its folders: {_folders(path.parent)}",
            )
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix in KINDS and _is_data(file.relative_to(path))
    )
    if not files:
        raise DataError(f"no data files in {path}", hint=f"known are: {', '.join(KINDS)}")
    chosen = _of_split(files, path, meta)
    kinds = {KINDS[file.suffix] for file in chosen}
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds files of several kinds: {sorted(kinds)}",
            hint="give one file or a folder with one kind, and add_dataset() for the others",
        )
    return chosen


def _check_file(path: Path, meta: DatasetMeta) -> None:
    if path.suffix not in KINDS:
        raise DataError(f"unknown kind of file: {path}", hint=f"known are: {', '.join(KINDS)}")
    if meta.subset or meta.split != "train":
        raise ConfigError(
            f"{path} is one file, without subsets and splits: got {meta.describe()}",
            hint="leave subset_name and split out, or give the folder",
        )


def _of_split(files: list[Path], path: Path, meta: DatasetMeta) -> list[Path]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(file)
    named = set(by_split) - {""}
    if not named and meta.split == "train":
        return files
    wanted = _SPLITS.get(meta.split, meta.split)
    if wanted not in by_split:
        raise DataError(
            f"{path} has no files of the split {meta.split!r}",
            hint=f"splits named in its files: {', '.join(sorted(named)) or 'none'}",
        )
    return by_split[wanted]


def _split_of(file: Path) -> str:
    """Return the split that a relative path names, or ""; the file's own name comes first."""
    for part in (file.stem, *reversed(file.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _is_data(file: Path) -> bool:
    """Leave out what is hidden, descriptions of data sets, and what `datasets` caches with them.

    `file` is relative to the data set's folder.
    """
    if any(part.startswith((".", "__")) for part in file.parts):
        return False
    if file.suffix == ".arrow" and file.name.startswith(("cache-", "tmp")):
        return False
    return not file.name.startswith("_") and file.name not in (
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "configuration.json",
    )


def _folders(path: Path) -> str:
    return ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir())) or "none"
