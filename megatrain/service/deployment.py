"""One base model as it is served: ranks, sampler, and the work for both."""

import asyncio
import hashlib
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

from megatrain.config.service import ServedModel, ServiceConfig
from megatrain.errors import MegatrainError, StateError
from megatrain.sampler.choose import make_sampler
from megatrain.sampler.types import Sampler, SampleRequest, SampleResult
from megatrain.service.files.files import Files
from megatrain.service.fleet.fleet import Fleet
from megatrain.service.fleet.loaded import Loaded
from megatrain.service.publish.publisher import Publisher
from megatrain.service.publish.trainer_sampler import TrainerSampler
from megatrain.service.publish.versions import Version
from megatrain.service.store import runs
from megatrain.service.store.records import Checkpoint
from megatrain.service.store.store import Store
from megatrain.service.wire.sampling import encode_sample_result
from megatrain.service.work.futures import Futures
from megatrain.service.work.operations import Fetch, Operations
from megatrain.service.work.run_state import RunState, adapter_name
from megatrain.service.work.sampling import SamplerState, Sampling
from megatrain.service.work.saves import Saves
from megatrain.service.work.scheduler import Scheduler
from megatrain.service.work.ticket import Result, Ticket
from megatrain.service.work.training import Operation, Training

logger = logging.getLogger(__name__)

SLOTS_PER_SEQUENCE = 4
"""Sequences that wait in the engine for each that it can draw at once."""


class Deployment:
    """Everything of one base model."""

    def __init__(
        self,
        served: ServedModel,
        config: ServiceConfig,
        folder: Path,
        *,
        futures: Futures,
        store: Store,
        files: Files,
        fetch: Fetch,
    ) -> None:
        """`folder` is this model's own.  Raises ConfigError, CheckpointError."""
        self.served, self._config = served, config
        self.fleet = Fleet(served, folder)
        self.samplers: dict[str, SamplerState] = {}
        """Sampling sessions of this model, by id."""
        self.trainer_sampler = TrainerSampler(self.fleet)
        sampler = make_sampler(
            served.sampler, self.fleet.base.folder, is_float32=self.fleet.is_float32
        )
        self.sampler: Sampler = self.trainer_sampler if sampler is None else sampler
        self.publisher = Publisher(self.fleet, self.sampler, draws=sampler is not None)
        self._publish_dir = publish_dir = config.publish_dir or _shared_memory(folder)
        self.saves = Saves(
            self.fleet,
            self.publisher,
            files,
            store,
            publish_dir,
            self.samplers,
            max_checkpoints=config.limits.max_checkpoints,
        )
        self.loaded = Loaded(folder / "loaded")
        operations = Operations(self.fleet, fetch, self._after_step, self.loaded)
        self.training = Training(self.fleet, futures, _kinds(operations, self.saves))
        self.scheduler = self._scheduler()
        self.sampling = self._sampling(futures)
        self._futures, self._store = futures, store
        self._tasks: list[asyncio.Task[Any]] = []
        self._audits: set[asyncio.Task[None]] = set()
        self._num_samples = 0
        self._named: dict[str, Version] = {}
        self.sampled_tokens = 0

    def _scheduler(self) -> Scheduler:
        config = self._config
        return Scheduler(
            self.training.start,
            self._give_up_gap,
            max_passes=1 + config.max_passes_ahead,
            max_pass_tokens=config.limits.max_pass_tokens,
            gap_s=config.times.gap_s,
            shares=config.priorities,
        )

    def _sampling(self, futures: Futures) -> Sampling:
        return Sampling(
            self.publisher,
            futures,
            slots=SLOTS_PER_SEQUENCE * self.served.sampler.max_batch,
            shares=self._config.priorities,
            choose=self.version_of,
            encode=encode_sample_result,
            done=self._sampled,
        )

    @property
    def name(self) -> str:
        """How clients call the model."""
        return self.served.name

    async def start(self) -> None:
        """Start ranks and sampler."""
        self._publish_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        await asyncio.gather(self.fleet.start(), self.sampler.start())

    def work(self) -> None:
        """Begin with what waits."""
        self._tasks = [
            asyncio.ensure_future(each)
            for each in (self.scheduler.run(), self.sampling.run(), self.fleet.watch())
        ]
        for task in self._tasks:
            task.add_done_callback(self._ended)
        self.scheduler.wake()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """Tell of work that should go on until it is cancelled."""
        if not task.cancelled():
            logger.critical("%s: %r has ended", self.name, task, exc_info=task.exception())

    @property
    def can_sample(self) -> bool:
        """Whether tokens are drawn here."""
        return self.sampler is not self.trainer_sampler

    async def named_version(self, checkpoint: Checkpoint, folder: Path) -> Version:
        """Return the version of a checkpoint, loaded into the sampler if it is not."""
        version = self._named.get(checkpoint.path)
        if version is not None and version.step == checkpoint.step and not version.retired:
            return version
        name = f"{adapter_name(checkpoint.path.removeprefix('tinker://'))}-{uuid.uuid4().hex[:8]}"
        version = Version(name, checkpoint.path, checkpoint.step, folder, is_owned=False)
        await self.publisher.load_checkpoint(version)
        self._named[checkpoint.path] = version
        return version

    def version_of(self, state: SamplerState) -> Version | None:
        """Return what a sampling session means now; None is the base."""
        if state.record.kind == "inflight" and state.record.run is not None:
            return self.saves.live.get(state.record.run)
        return state.version

    async def _give_up_gap(self, ticket: Ticket, missing: Any) -> None:
        numbers = ", ".join(map(str, list(missing)[:5]))
        error = StateError(
            f"request {ticket.seq} waited {self._config.times.gap_s:g} s for requests {numbers}, "
            "which never came",
            hint="send the numbers of a run without gaps",
        )
        # Written down too: the numbers are not waited for again after a start.
        run = self.scheduler.runs.get(ticket.run or "")
        progress = []
        if run is not None:
            progress = [runs.progress(run.id, ticket.seq + 1, run.step, time.time())]
        await self._futures.finish(ticket, Result.of_error(error), *progress)

    async def _after_step(self, run: RunState) -> None:
        every = self.served.sampler.live_every
        if not every or run.step % every:
            return
        try:
            await self.saves.publish(run)
        except MegatrainError as error:  # the step is done all the same
            run.last_error = error.message
            logger.warning("run %s did not go live: %s", run.id, error)

    def _sampled(
        self,
        state: SamplerState,
        ticket: Ticket,
        request: SampleRequest,
        result: SampleResult,
        version: Version | None,
    ) -> None:
        tokens = sum(len(each.tokens) for each in result.sequences)
        self.sampled_tokens += tokens
        ticket.tokens = len(request.prompt) + tokens
        self._num_samples += 1
        every = self.served.sampler.audit_every
        if not every or self._num_samples % every or version is None:
            return
        self._audit(version, request, result)

    def _audit(self, version: Version, request: SampleRequest, result: SampleResult) -> None:
        """Have the trainer score a sample, if its adapter is still at the version's step."""
        run = self.scheduler.runs.get(version.source)
        first = result.sequences[0]
        plain = request.temperature == 1 and request.top_k == -1 and request.top_p == 1
        if run is None or run.step != version.step or run.in_flight or not plain:
            return
        if not first.tokens:
            return
        audit = self.publisher.audit(version, run.adapter, request.prompt, first)
        task = asyncio.ensure_future(audit)
        self._audits.add(task)
        task.add_done_callback(self._audits.discard)

    def sessions(self) -> set[str]:
        """Return the sessions that have a run or a sampler here."""
        runs_of = {run.record.session for run in self.scheduler.runs.values()}
        return runs_of | {state.record.session for state in self.samplers.values()}

    def close_runs(self, session: str) -> None:
        """Take no more requests of a session that is over, and start none of those that wait."""
        for run in self._runs_of(session):
            run.closed = True
            run.queue.drain()

    def _runs_of(self, session: str) -> list[RunState]:
        return [run for run in self.scheduler.runs.values() if run.record.session == session]

    async def release(self, session: str) -> None:
        """Take off the ranks, and out of the sampler, what belongs to a session that is over.

        Its runs are closed, and what waited for them has a result.
        """
        self._release_samplers(session)
        for run in self._runs_of(session):
            while run.in_flight:
                await asyncio.sleep(0.05)
            if self.scheduler.runs.pop(run.id, None) is None:  # released by another meanwhile
                continue
            self.saves.forget(run)
            try:
                await self.fleet.let_go(run.record)
            except MegatrainError as error:  # it was never made
                level = logging.DEBUG if run.record.is_lora else logging.ERROR
                logger.log(level, "run %s could not be let go: %s", run.id, error.message)
            await self._store.write(runs.set_state(run.id, "released"))
        self._release_samplers(session)  # a save that was running has made another

    def _release_samplers(self, session: str) -> None:
        for key, state in list(self.samplers.items()):
            if state.record.session == session:
                del self.samplers[key]
                self._futures.forget_sampler(key)
                if state.version is not None and not state.version.is_owned:
                    self.publisher.versions.release(state.version)

    async def drain(self, timeout_s: float) -> None:
        """Finish what runs, and start nothing more."""
        await asyncio.gather(self.scheduler.drain(timeout_s), self.sampling.drain(timeout_s))

    async def close(self) -> None:
        """End ranks and sampler."""
        for task in self._tasks:
            task.cancel()
        await self.publisher.versions.close()
        await asyncio.gather(self.sampler.close(), self.fleet.close(), return_exceptions=True)


def _kinds(operations: Operations, saves: Saves) -> dict[str, Operation]:
    """Return who does a request that is no pass, by its kind."""
    return {
        "create_model": operations.create,
        "load_weights": operations.load,
        "optim_step": operations.step,
        "unload_model": operations.unload,
        "save_weights": saves.training,
        "save_weights_for_sampler": saves.for_sampler,
        "save_weights_external": saves.external,
    }


def _shared_memory(folder: Path) -> Path:
    """Return this model's folder in shared memory, or on disk where there is none."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return folder / "published"
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return shared / f"megatrain-{os.getuid()}-{digest}"
