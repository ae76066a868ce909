"""A process that imports Megatron once and forks ranks: seconds a rank are saved at every start.

    driver -> server   a line of JSON (the rank's environment), with its standard input and output
    server -> driver   {"pid": 12} in answer; {"pid": 12, "status": -9} when a rank has ended

Only for processors: a device's context does not survive a fork.  It ends when the driver does, and
so do its ranks, whose standard input is closed then.
"""

import array
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import NoReturn

import torch

from megatrain.bus.beat import EXIT_LOST

POLL_S = 0.05
"""Seconds between looks for ranks that have ended."""
NUM_FILES = 2
"""Standard input and output of a rank."""


def serve(connection: socket.socket) -> None:
    """Fork ranks until the driver hangs up."""
    _import_everything()
    gc.collect()
    gc.freeze()  # a collection in a rank need not copy what was imported before the fork
    connection.sendall(b"{}\n")
    pending: bytes = b""
    files: list[int] = []
    while True:
        _tell_of_the_dead(connection)
        ready, _, _ = select.select([connection], [], [], POLL_S)
        if not ready:
            continue
        data, more = _receive(connection)
        if not data:
            return
        pending, files = pending + data, files + more
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = _fork(json.loads(line), files[:NUM_FILES], connection)
            for file in files[:NUM_FILES]:
                os.close(file)
            files = files[NUM_FILES:]
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _import_everything() -> None:
    from megatrain.platforms.bridge_import import import_megatron  # noqa: PLC0415 - seconds

    import_megatron()
    from megatrain.bus import rank_job, worker  # noqa: F401, PLC0415 - Megatron comes first


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    files = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(8 * NUM_FILES))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    return data, files.tolist()


def _fork(environment: dict[str, str], files: list[int], connection: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        connection.close()
        _be_a_rank(environment, files)
    except BaseException:  # noqa: BLE001 - the server's own code must not go on in a rank
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _be_a_rank(environment: dict[str, str], files: list[int]) -> NoReturn:
    os.setsid()
    for target, file in enumerate([files[0], files[1], files[1]]):
        os.dup2(file, target)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(environment)
    known = set(sys.path)
    sys.path += [path for path in environment["PYTHONPATH"].split(os.pathsep) if path not in known]
    os.chdir(environment["PWD"])
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the variable was read before
    from megatrain.bus.rank_job import run  # noqa: PLC0415 - imported before
    from megatrain.bus.rank_options import RankOptions  # noqa: PLC0415

    os._exit(run(RankOptions.from_environment()))


def _tell_of_the_dead(connection: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        ended = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
        connection.sendall(json.dumps(ended).encode() + b"\n")


def main(file: int) -> None:
    """Serve the driver at the other end of this file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends all
    try:
        serve(socket.socket(fileno=file))
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(EXIT_LOST)


if __name__ == "__main__":
    main(int(sys.argv[1]))
