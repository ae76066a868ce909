"""Share a conversion among processes: each writes files of its own into one folder."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatrain.errors import ExportError
from megatrain.export.conversion.request import Job, to_json

Progress = Callable[[int], None]


def run_job_on(job: Job, folder: Path, number: int, progress: Progress) -> dict[str, Any]:
    """Do all of the work on so many processes, in this one if it is 1.

    Returns `files`, `left_out` and the largest `peak_memory_growth` of the others.  Raises
    ExportError with a process's own words; what is whole stays in the folder.
    """
    if number == 1:
        written = job.run(folder, (0, 1), progress)
        return {"files": written.files, "left_out": written.left_out, "peak_memory_growth": 0}
    with tempfile.TemporaryDirectory(prefix="megatrain-convert-") as name:
        request = Path(name) / "request.json"
        request.write_text(json.dumps(to_json(job)))
        return _start(request, folder, number, progress)


def _start(request: Path, folder: Path, number: int, progress: Progress) -> dict[str, Any]:
    program = [
        sys.executable,
        "-m",
        "megatrain.export.conversion.worker",
        str(request),
        str(folder),
    ]
    processes = [
        subprocess.Popen(
            [*program, str(index), str(number)],
            stdin=subprocess.PIPE,  # nothing comes; it closes when this process ends, however
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]
    answers: list[dict[str, Any]] = [{} for _ in processes]
    errors = ["" for _ in processes]
    lock = threading.Lock()

    def listen(index: int) -> None:
        process = processes[index]
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "read" in message:
                with lock:
                    progress(message["read"])
            else:
                answers[index] = message

    def listen_to_errors(index: int) -> None:
        stream = processes[index].stderr
        assert stream is not None
        errors[index] = stream.read()[-2000:]

    threads = [
        threading.Thread(target=target, args=(index,), daemon=True)
        for index in range(number)
        for target in (listen, listen_to_errors)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return _together(answers, errors)


def _together(answers: list[dict[str, Any]], errors: list[str]) -> dict[str, Any]:
    for index, (answer, error) in enumerate(zip(answers, errors, strict=True)):
        if "error" in answer:
            raise ExportError(answer["error"], hint=answer["hint"])
        if "done" not in answer:
            raise ExportError(
                f"process {index} of the conversion ended without a word: {error.strip()}",
                hint="run the same command again: it goes on where it stopped",
            )
    done = [answer["done"] for answer in answers]
    return {
        "files": done[0]["files"],
        "left_out": done[0]["left_out"],
        "peak_memory_growth": max(each["peak_memory_growth"] for each in done),
    }
