"""A PostgreSQL of the test's own, where Debian's packages are installed: started, killed, started.

It is reached by a socket in its folder, and run by an unprivileged user.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

START_S = 60.0


class Postgres:
    """A cluster."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        self.url = f"postgresql://postgres@/postgres?host={folder}"
        self._run("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", f"{self._folder}/data", *arguments]
        user = "postgres" if os.geteuid() == 0 else None
        subprocess.run(
            command,
            check=True,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=START_S,
        )

    def start(self) -> None:
        """Start it and wait until it answers; processes of one that was killed may still end."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self._folder}"
        limit = time.monotonic() + START_S
        while True:
            try:
                return self._run(
                    "pg_ctl", "-w", "-l", f"{self._folder}/log", "-o", options, "start"
                )
            except subprocess.CalledProcessError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.2)

    def kill(self) -> None:
        """Kill the postmaster, and with it all that it has started, as a lost machine does."""
        pid = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        backends = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, backends)):  # a backend notices only when it next looks
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def stop(self) -> None:
        """End it without waiting for its clients."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, if it is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if found:
        return found[-1]
    program = shutil.which("initdb")
    return None if program is None else Path(program).parent


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """Run a cluster."""
    found = programs()
    assert found is not None
    with tempfile.TemporaryDirectory(prefix="megatrain-pg-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        cluster = Postgres(found, folder)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
