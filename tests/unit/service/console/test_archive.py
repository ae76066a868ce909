"""Tars that are made while they are sent."""

import asyncio
import io
import tarfile
from pathlib import Path

from megatrain.service.console.archive import pieces_of, size_of
from megatrain.service.files.files import Files

NAMES = {"a": 0, "deep/er/b.bin": 511, "c": 512, "d": (4 << 20) + 5, "long/" * 40 + "ü": 3}


def test_any_names_and_sizes_come_out_as_they_went_in_and_the_size_is_told_before(tmp_path) -> None:
    contents = {name: bytes([at + 1]) * size for at, (name, size) in enumerate(NAMES.items())}
    for name, data in contents.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    async def made() -> tuple[int, bytes]:
        files = await Files.open(str(tmp_path / "files"), Path(tmp_path / "service"))
        await files.put_folder("run/weights/one", tmp_path / "made")
        manifest = await files.manifest("run/weights/one")
        pieces = [piece async for piece in pieces_of(files, "run/weights/one", manifest)]
        return size_of(manifest), b"".join(pieces)

    size, data = asyncio.run(made())
    assert size == len(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]
    assert found == contents
