"""Ranks as processes of actors, which a driver starts on a Ray cluster, watches and ends."""

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatrain.bus.address import Address
from megatrain.bus.rank_options import RankOptions
from megatrain.bus.rank_process import how_it_ended
from megatrain.bus.ray.actor import KILLED_S, RankActor
from megatrain.bus.ray.placement import Bundle, Placement
from megatrain.bus.ray.places import Place, variables
from megatrain.bus.ray.plan import Plan
from megatrain.bus.token import read_token
from megatrain.config.bus import BusConfig
from megatrain.errors import RankError, StateError

ACTOR_THREADS = 4
"""One of them waits for the rank's end."""
PASSED_ON = "MEGATRAIN_"
"""Variables of the driver that ranks on any node get; others are for Ray's runtime_env."""


class RayRanks:
    """An actor, and a process of its own below it, for every rank of a group."""

    def __init__(
        self, placement: Placement, plan: Plan, config: BusConfig, *, seed: int, timeout_s: float
    ) -> None:
        """Start nothing yet; `self.config` is for the driver: it has a token, if only its own."""
        self._placement, self._plan = placement, plan
        placement.hold()
        self._folder = Path(tempfile.mkdtemp(prefix="megatrain-"))  # 0700
        self.config = config if config.token_file else _with_token(config, self._folder / "token")
        self._options = RankOptions(
            listen="",
            mesh=plan.mesh,
            seed=seed,
            platform=plan.platform,
            timeout_s=timeout_s,
            bus=self.config,
            dies_with_input=True,
        )
        self._lock = threading.RLock()
        """Held over all calls of Ray: one after ray.shutdown would start another cluster."""
        self._actors: list[Any] = []
        self._waits: dict[Any, int] = {}
        """The rank of each reference that resolves when the rank ends."""
        self._names: list[str] = []
        self._ended: dict[int, tuple[int | None, str, str]] = {}
        """By rank: exit status, None if that is not known; how it ended; what it said last."""
        self._folders: list[str] = []
        """On the ranks' nodes, of the last start."""
        self._starts = 0
        self._closed = False

    @property
    def _ray(self) -> Any:
        return self._placement.cluster.ray

    def start(self) -> Address:
        """Start all ranks, anew if they have run before; return where rank 0 will listen.

        Raises RankError if Ray does not start them in time, StateError if Ray was shut down.
        """
        with self._lock:
            self._check_there()
            self.end(grace_s=0.0)
            self._starts += 1
            bundles = self._placement.bundles()[: self._plan.group.num_ranks]
            self._actors = [self._actor(*each) for each in enumerate(bundles)]
            places = [Place(**each) for each in self._ask("place", None, self._folders)]
            self._folders = [place.folder for place in places]
            address = self._address(places)
            environments = self._environments(places, address)
            assert self.config.token_file is not None
            token = read_token(self.config.token_file)
            pids = self._ask("start", environments, os.getcwd(), token)
            self._names = [
                f"rank {rank} (node {place.ip}, pid {pid})"
                for rank, (place, pid) in enumerate(zip(places, pids, strict=True))
            ]
            self._waits = {actor.wait.remote(): rank for rank, actor in enumerate(self._actors)}
            return address

    def _check_there(self) -> None:
        if not self._placement.cluster.is_there:
            raise StateError(
                "Ray was shut down while its ranks were in use",
                hint="call megatrain.shutdown() before ray.shutdown()",
            )

    def _actor(self, rank: int, bundle: Bundle) -> Any:
        device, share = self._plan.device, self._plan.share
        return (
            self._ray.remote(RankActor)
            .options(
                num_cpus=self._plan.group.cpus_per_rank,
                num_gpus=share if device == "GPU" else 0,
                resources={device: share} if device not in (None, "GPU") else None,
                scheduling_strategy=self._placement.strategy(bundle),
                max_restarts=0,  # all ranks start anew, or none
                max_concurrency=ACTOR_THREADS,
            )
            .remote(f"{self._plan.group.name} rank {rank}")
        )

    def _ask(self, method: str, each: Sequence[Any] | None = None, *same: Any) -> list[Any]:
        """Call a method of all actors, with an argument of its own for each if there are any."""
        own = [()] * len(self._actors) if each is None else [(value,) for value in each]
        calls = [
            getattr(actor, method).remote(*first, *same)
            for actor, first in zip(self._actors, own, strict=True)
        ]
        name, limit_s = self._plan.group.name, self.config.connect_timeout_s
        try:
            answers: list[Any] = self._ray.get(calls, timeout=limit_s)
        except self._ray.exceptions.GetTimeoutError as error:
            raise RankError(
                f"Ray has not started the {len(calls)} actors of group {name!r} within "
                f"{limit_s:g} s",
                hint="`ray status` says what they wait for; raise connect_timeout_s if it is slow",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise RankError(f"an actor of group {name!r} has failed: {error}") from error
        return answers

    def _address(self, places: Sequence[Place]) -> Address:
        """Return a Unix socket for a rank 0 on the driver's node, else a port there."""
        first = places[0]
        if first.node == self._placement.cluster.home:
            return Address(path=f"{first.folder}/socket")
        return Address(host=first.ip, port=first.ports[1])

    def _environments(self, places: Sequence[Place], address: Address) -> list[dict[str, str]]:
        """Return the variables of each rank.  Ranks of one node meet on its loopback alone."""
        on_one_node = len({place.node for place in places}) == 1
        common = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        common["TORCHELASTIC_RESTART_COUNT"] = str(self._starts)
        found = []
        for place, own in zip(places, variables(places, self._plan.device), strict=True):
            options = replace(
                self._options,
                listen=str(address),
                rendezvous=f"{places[0].folder}/port" if on_one_node else None,
                bus=self.config.model_copy(update={"token_file": Path(place.folder) / "token"}),
            )
            found.append(common | options.to_environment() | own)
        return found

    def failure(self) -> str | None:
        """Return which ranks have ended, those that were killed first; None if all run."""
        with self._lock:
            self._look()
            ended = sorted(self._ended.items())
        killed = [text for _, (status, text, _) in ended if status is None or status < 0]
        return "; ".join(killed or [text for _, (_, text, _) in ended]) or None

    def _look(self) -> None:
        """Note which ranks have ended meanwhile.  It does not wait."""
        if not self._waits or not self._placement.cluster.is_there:
            return
        waits = list(self._waits)
        ready, _ = self._ray.wait(waits, num_returns=len(waits), timeout=0)
        for each in ready:
            rank = self._waits.pop(each)
            self._ended[rank] = self._end_of(self._names[rank], each)

    def _end_of(self, name: str, reference: Any) -> tuple[int | None, str, str]:
        try:
            status, said = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return None, f"{name} is gone with its actor", f"{name}: {error}"
        return status, f"{name} {how_it_ended(status)}", said

    def output(self) -> str:
        """Return the last lines of the ranks that have ended with an error."""
        with self._lock:
            return "\n".join(
                f"rank {rank}:\n{said}"
                for rank, (status, _, said) in sorted(self._ended.items())
                if status != 0 and said
            )

    def end(self, grace_s: float = 10.0) -> None:
        """End all ranks; those that do not end by themselves within the grace are killed."""
        with self._lock:
            actors, waits = self._actors, list(self._waits)
            self._actors, self._waits, self._ended = [], {}, {}
            if not actors or not self._placement.cluster.is_there:
                return
            if waits and grace_s:
                self._ray.wait(waits, num_returns=len(waits), timeout=grace_s)
            calls = [actor.end.remote() for actor in actors]
            self._ray.wait(calls, num_returns=len(calls), timeout=KILLED_S)
            for actor in actors:
                with contextlib.suppress(self._ray.exceptions.RayError):
                    self._ray.kill(actor)

    def close(self, *, orderly: bool = True) -> None:
        """End all ranks and leave the cluster, if nobody else here is on it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.end()
            self._placement.release()
        shutil.rmtree(self._folder, ignore_errors=True)


def _with_token(config: BusConfig, path: Path) -> BusConfig:
    """Return the configuration with a secret that only this driver and its ranks will know."""
    path.touch(0o600)
    path.write_text(secrets.token_hex(32))
    return config.model_copy(update={"token_file": path})
