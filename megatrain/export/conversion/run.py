"""Do a whole conversion: begin or go on, share the work, verify, put the result in its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.errors import ExportError
from megatrain.export.conversion import to_hugging_face, to_megatron
from megatrain.export.conversion.request import Job, to_json
from megatrain.export.conversion.to_megatron import ToMegatron
from megatrain.export.conversion.verify import verify_export, verify_import
from megatrain.export.conversion.workers import run_job_on
from megatrain.export.folder import check_may_replace
from megatrain.export.resumable import Journal, ResumableFolder, check_space, explained


def convert(
    job: Job,
    target: Path,
    *,
    needed_bytes: int,
    workers: int,
    restart: bool,
    verify: bool,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Write `target` and return what a report says of it; `check` comes before.

    Raises ExportError or CheckpointError; then there is no `target`, and the same call goes on
    where this one stopped.
    """
    place = ResumableFolder(target, _identity(job), may_replace=_is_empty, restart=restart)
    # What an earlier run left is gone on with, or makes room.
    written = sum(path.stat().st_size for path in place.folder.rglob("*") if path.is_file())
    check_space(place.folder, needed_bytes - written)
    with explained(place.folder), place:
        result = run_job_on(job, place.folder, workers, progress)
        planned = result.pop("files")
        if lacking := sorted(set(planned) - Journal(place.folder, trusted=True).done.keys()):
            raise ExportError(
                f"{len(lacking)} file(s) were not written: {', '.join(lacking[:5])}",
                hint="run the same command again: it goes on where it stopped",
            )
        if isinstance(job, ToMegatron):
            to_megatron.finish(place.folder, job)
        else:
            to_hugging_face.finish(place.folder, job)
        if verify:
            result["verified"] = _verify(job, place.folder)
        place.finish(planned)
    return {**_said_of(result.pop("left_out")), **result, "files": len(planned)}


def check(job: Job, target: Path) -> None:
    """Raise what the conversion would raise for its source, layout or target; write nothing."""
    here, there = job.source.resolve(), Path(target).resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ExportError(
            f"the result must be outside of what it is made of: {target}, {job.source}",
            hint="choose another folder",
        )
    check_may_replace(Path(target), _is_empty)
    job.check()


def _said_of(left_out: list[str]) -> dict[str, Any]:
    if not left_out:
        return {}
    text = f"{len(left_out)} tensor(s) that Megatron's model has no place for"
    return {"beside": text, "tensors_beside": list(left_out)}


def _verify(job: Job, folder: Path) -> int:
    if isinstance(job, ToMegatron):
        return verify_import(job, folder)
    return verify_export(job, folder)


def _is_empty(directory: Path) -> bool:
    return not any(directory.iterdir())


def _identity(job: Job) -> dict[str, Any]:
    """Return what decides the bytes of the result, the source's files included."""
    files = {
        str(path.relative_to(job.source)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(job.source.rglob("*"))
        if path.is_file()
    }
    return {**to_json(job), "files": files}
