"""What each process of `megatrain worker` runs: join, listen, do as told, leave.

Started by torchrun, or by LocalRanks, which names a file by which the ranks find each other.
"""

import logging
import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatrain.bus.address import Address
from megatrain.bus.beat import EXIT_LOST, Beat, key, read_beat
from megatrain.bus.codec import encode
from megatrain.bus.frames import Kind
from megatrain.bus.handshake import Welcome
from megatrain.bus.last_words import on_sigterm, the_dead
from megatrain.bus.pulse import Pulse
from megatrain.bus.rank_options import RankOptions
from megatrain.bus.server import Server
from megatrain.bus.watch import Loss, Watch
from megatrain.errors import BusError
from megatrain.log import setup_logging
from megatrain.parallel.joined import Session, join

logger = logging.getLogger(__name__)


def run(options: RankOptions) -> int:
    """Be one rank until the driver says stop; return the exit status.

    A rank that cannot go on ends at once with EXIT_LOST: whoever started it starts all anew.
    """
    setup_logging()
    door = _Door()
    on_sigterm(door.leave)
    if options.dies_with_input:
        threading.Thread(target=_die_with_input, name="bus-parent", daemon=True).start()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    store = _store(options, rank, world)
    session = join(
        options.mesh,
        seed=options.seed,
        platform=options.platform,
        timeout_s=options.timeout_s,
        store=dist.PrefixStore("groups", store),
        rank=rank,
        world_size=world,
    )
    timeout_s = options.bus.heartbeat_timeout_s
    pulse = Pulse(_own(store, timeout_s), rank, interval_s=min(1.0, timeout_s / 5))
    try:
        if rank == 0:
            door.server = _serve(options, session, store, world)
        watches = _watch(rank, world, _own(store, timeout_s), timeout_s, door)
        from megatrain.bus.worker import Worker  # noqa: PLC0415 - Megatron can be imported now

        Worker(session, pulse, door.server).run()
        for each in watches:
            each.close()
        pulse.close()
    except Exception:
        # A peer is gone in the middle of a collective, most likely: groups cannot be left orderly.
        logger.exception("rank %d ends", rank)
        time.sleep(min(1.0, timeout_s / 5))  # whoever is the cause may be named meanwhile
        door.leave()
    _end(0, door.server)
    return 0


class _Door:
    """Rank 0's server, once it is there, and what it has heard of all ranks."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.beats: list[Beat] = []

    def tell(self, loss: Loss) -> None:
        """Say who is lost, if a driver is there to hear it."""
        logger.error("%s", loss.text)
        if self.server is not None:
            body = {
                "ranks": list(loss.ranks),
                "text": loss.text,
                "stacks": loss.stacks,
                "late": loss.is_late,
            }
            self.server.tell(Kind.LOST, encode(body))

    def leave(self) -> None:
        """End at once, after saying whose process is gone."""
        if (loss := the_dead(self.beats)) is not None:
            self.tell(loss)
        _end(EXIT_LOST)


def _end(status: int, server: Server | None = None) -> None:
    """End without waiting for threads that wait for others."""
    if server is not None:
        server.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _die_with_input() -> None:
    """End when standard input does: the process that started this rank is gone then."""
    while os.read(0, 1 << 10):
        pass
    os._exit(EXIT_LOST)


def _store(options: RankOptions, rank: int, world: int) -> Any:
    """Return the ranks' store: torchrun's, or one that rank 0 keeps and a file leads to."""
    if options.rendezvous is None and world == 1 and "MASTER_ADDR" not in os.environ:
        return _kept_store()
    if options.rendezvous is None:
        store, _, _ = next(dist.rendezvous("env://", rank, world))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"megatrain/{attempt}", store)
    path = Path(options.rendezvous)
    if rank == 0:
        store = _kept_store()
        hidden = path.with_suffix(".partial")
        hidden.write_text(str(store.port))
        hidden.rename(path)
        return store
    limit = time.monotonic() + options.bus.connect_timeout_s
    while not path.exists():
        if time.monotonic() > limit:
            raise BusError(f"rank 0 did not start within {options.bus.connect_timeout_s:g} s")
        time.sleep(0.02)
    port = int(path.read_text())
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def _kept_store() -> Any:
    """Return a store that this process keeps, for this host alone."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _own(store: Any, timeout_s: float) -> Any:
    """Return another connection to the same store, so that threads do not wait for each other.

    An answer that does not come in time means that the store's host is lost.
    """
    own = store.clone()
    own.set_timeout(timedelta(seconds=timeout_s))
    return own


def _serve(options: RankOptions, session: Session, store: Any, world: int) -> Server:
    beats = [read_beat(each) for each in store.multi_get([key(rank) for rank in range(world)])]
    welcome = Welcome(
        epoch=secrets.token_hex(8),
        last_seq=0,
        mesh=session.groups.mesh.to_dict(),
        hosts=[beat.host for beat in beats],
        pids=[beat.pid for beat in beats],
        platform=session.platform.name,
    )
    server = Server(Address.parse(options.listen), options.bus, welcome)
    logger.info("%d rank(s) on %s listen at %s", world, socket.gethostname(), server.address)
    return server


def _watch(rank: int, world: int, store: Any, timeout_s: float, door: _Door) -> list[Watch]:
    """Watch all from rank 0, and rank 0 from rank 1."""

    def lost(loss: Loss) -> None:
        door.tell(loss)
        _end(EXIT_LOST)

    def heard(beats: list[Beat]) -> None:
        assert door.server is not None
        door.beats = beats
        door.server.tell(Kind.HEALTH, encode({"beats": beats, "queued": door.server.queued()}))

    if door.server is not None:
        return [Watch(store, range(world), timeout_s=timeout_s, lost=lost, heard=heard)]
    return [Watch(store, [0], timeout_s=timeout_s, lost=lost)] if rank == 1 else []
