"""torch's profiler around commands, switched on and off by one."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatrain.errors import StateError


class Profiler:
    """This rank's profiler."""

    def __init__(self) -> None:
        self._running: tuple[profile, Path] | None = None

    def switch(self, directory: str | None, rank: int) -> str | None:
        """Start to record, or with None stop and return the file of the trace.

        Raises StateError if it records already, or does not.
        """
        if directory is not None:
            if self._running is not None:
                raise StateError("the profiler records already", hint="Profile(directory=None)")
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            running = profile(activities=activities)
            running.start()
            self._running = running, Path(directory)
            return None
        if self._running is None:
            raise StateError("the profiler does not record")
        running, folder = self._running
        self._running = None
        running.stop()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace-rank-{rank}.json"
        running.export_chrome_trace(str(path))
        return str(path)
