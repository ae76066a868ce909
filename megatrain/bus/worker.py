"""READ FIRST of the bus.  A rank that does what a driver says.

    rank 0: Server.next -> Channel.broadcast -> every rank: decode, check -> vote -> do -> vote
    -> rank 0: Server.reply

A command that any rank cannot start is done by none; what goes wrong later is heard by all.
"""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, assert_never

import psutil
import torch

from megatrain.bus import snapshot
from megatrain.bus.channel import Channel
from megatrain.bus.codec import Failure, RawTensor, decode, encode
from megatrain.bus.commands import (
    CloseModel,
    Command,
    ForwardBackwardMany,
    ForwardMany,
    GetState,
    Inspect,
    Load,
    OpenModel,
    Ping,
    Profile,
    RankCommand,
    RestoreSnapshot,
    Resume,
    Stop,
    TakeSnapshot,
)
from megatrain.bus.failures import failure_of
from megatrain.bus.jobs import Job
from megatrain.bus.model_host import ModelHost
from megatrain.bus.profile import Profiler
from megatrain.bus.pulse import Pulse
from megatrain.bus.scattered import SMALLEST, joined, split
from megatrain.bus.server import Server
from megatrain.errors import BusError, ConfigError, MegatrainError, StateError
from megatrain.export.save import finish_save
from megatrain.parallel import phase
from megatrain.parallel.joined import Session
from megatrain.types import StepOutput

logger = logging.getLogger(__name__)

IDLE_S = 10.0
"""Seconds between signs of rank 0 to ranks that wait, so that no collective times out."""


class Worker:
    """One rank's loop."""

    def __init__(self, session: Session, pulse: Pulse, server: Server | None) -> None:
        """`server` is rank 0's; None elsewhere."""
        self.session, self._pulse, self._server = session, pulse, server
        self._channel = Channel(session.groups)
        self._models: dict[str, ModelHost] = {}
        self._profiler = Profiler()
        self._rows: list[Any] | None = None
        """Rank 0's, of a command that is scattered."""
        self._stopping = False

    def run(self) -> None:
        """Do commands until one says stop."""
        while not self._stopping:
            job = self._next()
            if job is not None:
                self._answer(job)

    def _next(self) -> Job | None:
        """Return the next command; None if there was none for a while.  Collective."""
        self._rows = None
        if self._server is None:
            return Job.unpack(self._channel.broadcast(None))
        job = self._server.next(IDLE_S)
        message = b"" if job is None else self._scattered(job).pack()
        self._channel.broadcast(message)
        return job if job is None else Job.unpack(memoryview(message), job.session)

    def _scattered(self, job: Job) -> Job:
        """Return the command as all ranks hear it: without rows that only some of them read."""
        job = replace(job, is_scattered=False)
        if len(job.payload) < SMALLEST or self.session.groups.mesh.dp == 1:
            return job
        try:
            command = decode(job.payload)
            parts = split(command, self._models.get(command.model))
        except Exception as error:  # noqa: BLE001 - every rank gets all, and says what is wrong
            logger.warning("a large command goes whole to all ranks: %r", error)
            return job
        if parts is None:
            return job
        self._rows = parts[1]
        return replace(job, payload=encode(parts[0]), is_scattered=True)

    def _answer(self, job: Job) -> None:
        self._pulse.begin(job.seq, "a command", job.deadline_s)
        start = time.perf_counter()
        command, failure = self._check(job)
        validated = time.perf_counter()
        failure = self._channel.vote(failure)
        value = None
        if failure is None:
            assert command is not None
            value, failure = self._do(command)
            failure = self._channel.vote(failure)
        tokens = _tokens(value)
        if self._server is not None:
            done = time.perf_counter()
            times = {"validate": validated - start, "execute": done - validated}
            self._server.reply(job, self._reply(command, value, failure, times))
        self._pulse.end(tokens=tokens, adapters=self._residents())

    def _check(self, job: Job) -> tuple[Command | None, Failure | None]:
        """Return the command, or why this rank cannot do it.  Nothing changes."""
        command: Command | None = None
        try:
            command = decode(job.payload)
            if job.is_scattered:
                command = joined(command, self._rows, self.session.groups)
            if not isinstance(command, Command):
                raise BusError(f"a command must come: got {type(command).__name__}")
            self._pulse.name(type(command).__name__)
            self._check_model(command)
        except Exception as error:  # noqa: BLE001 - a veto, which the driver hears
            return command, self._failure(error, command)
        return command, None

    def _check_model(self, command: Command) -> None:
        if isinstance(command, OpenModel):
            self._check_open(command)
        elif not isinstance(command, RankCommand):
            self._host(command).check(command)
        elif isinstance(command, CloseModel):
            self._host(command)

    def _check_open(self, command: OpenModel) -> None:
        known, mesh = self._models.get(command.model), self.session.groups.mesh.to_dict()
        if command.layout is not None and dict(command.layout) != mesh:
            raise ConfigError(
                f"the ranks are laid out as {mesh}, and the model asks for {dict(command.layout)}",
                hint="leave device_mesh out, or start the ranks with that mesh",
            )
        if known is not None and known.opened != command:
            raise StateError(f"there is another model called {command.model!r} on the ranks")

    def _host(self, command: Command) -> ModelHost:
        if command.model not in self._models:
            raise StateError(
                f"there is no model called {command.model!r} on the ranks; known: "
                f"{', '.join(self._models) or 'none'}"
            )
        return self._models[command.model]

    def _do(self, command: Command) -> tuple[Any, Failure | None]:
        phase.enter(phase.EXECUTING)
        try:
            if isinstance(command, RankCommand):
                return self._run(command), None
            return self._host(command).run(command), None  # type: ignore[arg-type]
        except Exception as error:
            logger.exception("%s failed on this rank", type(command).__name__)
            self._pulse.fail(f"{type(error).__name__}: {error}")
            return None, self._failure(error, command)

    def _run(self, command: RankCommand) -> Any:
        match command:
            case OpenModel():
                phase.enter(phase.LOADING)
                return self._open_model(command)
            case CloseModel():
                del self._models[command.model]
                return None
            case Inspect():
                return self._inspect()
            case Ping():
                return None
            case Profile():
                return self._profiler.switch(command.directory, self.session.groups.rank)
            case TakeSnapshot():
                phase.enter(phase.SAVING)
                return snapshot.take(Path(command.directory), self._models, self.session)
            case RestoreSnapshot():
                phase.enter(phase.LOADING)
                self._models = {}
                if command.directory is not None:
                    self._models = snapshot.restore(Path(command.directory), self.session)
                return None
            case Stop():
                self._stopping = True
                return self._finish_saves()
            case _:
                assert_never(command)

    def _finish_saves(self) -> None:
        """Wait for what is written in the background; nobody else will."""
        phase.enter(phase.SAVING)
        try:
            finish_save(self.session.groups)
        except MegatrainError as error:
            logger.error("%s", error)

    def _open_model(self, command: OpenModel) -> None:
        if command.model not in self._models:
            self._models[command.model] = ModelHost(command, self.session)

    def _inspect(self) -> dict[str, Any]:
        process = psutil.Process()
        return {
            "layout": self.session.groups.mesh.to_dict(),
            "platform": self.session.platform.name,
            "models": {key: host.opened.model_id for key, host in self._models.items()},
            "adapters": {key: host.trained for key, host in self._models.items()},
            "residents": {key: host.residents.tiers() for key, host in self._models.items()},
            "resident_bytes": process.memory_info().rss,
            "threads": threading.active_count(),
            "files": process.num_fds(),
        }

    def _residents(self) -> dict[str, int]:
        """Return how many adapters of all models are where."""
        counts: dict[str, int] = {}
        for host in self._models.values():
            for tier, names in host.residents.tiers().items():
                counts[tier] = counts.get(tier, 0) + len(names)
        return counts

    def _failure(self, error: BaseException, command: Command | None) -> Failure:
        name = "a command" if command is None else type(command).__name__
        return failure_of(error, rank=self.session.groups.rank, command=name)

    def _reply(
        self, command: Command | None, value: Any, failure: Failure | None, times: dict[str, float]
    ) -> bytes:
        """Return the encoded reply; what cannot be sent is a failure too."""
        if failure is None:
            assert command is not None
            try:
                return encode(self._done(command, value) | {"times": times})
            except Exception as error:  # noqa: BLE001 - a plug-in's result may be anything
                failure = self._failure(error, command)
        return encode({"failure": failure, "times": times})

    def _done(self, command: Command, value: Any) -> dict[str, Any]:
        host = self._models.get(command.model)
        trained = [] if host is None else host.trained
        if isinstance(command, GetState) and value is not None:
            value = {name: _raw(tensor) for name, tensor in value.items()}
        if isinstance(command, ForwardBackwardMany | ForwardMany):
            value = {
                name: self._failure(each, command) if isinstance(each, Exception) else each
                for name, each in value.items()
            }
        source = host.last_source if host and isinstance(command, Load | Resume) else ""
        return {"value": value, "trained": trained, "source": source}


def _tokens(value: Any) -> int:
    """Return the tokens that a pass has seen, if it was one."""
    outputs = value.values() if isinstance(value, dict) else [value]
    return sum(sum(map(len, each.logps)) for each in outputs if isinstance(each, StepOutput))


def _raw(tensor: torch.Tensor) -> RawTensor:
    flat = tensor.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    return RawTensor(str(flat.dtype).removeprefix("torch."), tuple(flat.shape), data)
