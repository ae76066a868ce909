"""One process's share of a conversion.

    python -m megatrain.export.conversion.worker REQUEST FOLDER INDEX NUMBER

REQUEST is a file of JSON; what is said on the output is a line of JSON each: `{"read": bytes}` as
work goes on, at last `{"done": {...}}` or `{"error": message, "hint": ...}`.  When its input ends,
the process that started it has ended, and it ends as well.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from megatrain.errors import MegatrainError
from megatrain.export.conversion.memory import PeakMemory, give_back_freed_tensors


def main(arguments: list[str]) -> int:
    """Do the share and return the exit status."""
    request, folder, index, number = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        done = _run(json.loads(Path(request).read_text()), Path(folder), (int(index), int(number)))
    except MegatrainError as error:
        _say({"error": error.message, "hint": error.hint})
        return 1
    _say({"done": done})
    return 0


def _end_with_parent() -> None:
    # Not through sys.stdin: this thread would hold its lock when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(1)


def _run(request: dict[str, Any], folder: Path, share: tuple[int, int]) -> dict[str, Any]:
    from megatrain.platforms.choose import choose_platform, prepare  # noqa: PLC0415 - slow import

    prepare(choose_platform("cpu"))
    from megatrain.export.conversion.request import from_json  # noqa: PLC0415

    give_back_freed_tensors()
    job = from_json(request)
    job.warm_up()
    with PeakMemory() as memory:
        written = job.run(folder, share, lambda num_bytes: _say({"read": num_bytes}))
    growth = {"peak_memory_growth": memory.growth}
    return {"files": written.files, "left_out": written.left_out, **growth}


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
