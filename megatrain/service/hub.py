"""Everything that is alive in the service: what is served, to whom, and what waits."""

import asyncio
import logging
import time
from pathlib import Path

from megatrain.config.service import ServedModel, ServiceConfig
from megatrain.errors import (
    ConfigError,
    DataError,
    MegatrainError,
    NotFoundError,
    RankError,
    StateError,
)
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.deployment import Deployment
from megatrain.service.files.files import Files
from megatrain.service.files.signed import Signer
from megatrain.service.intake import Intake
from megatrain.service.lock import lock
from megatrain.service.restore import restore
from megatrain.service.sessions import Sessions
from megatrain.service.store import checkpoints, samplers
from megatrain.service.store.janitor import Keep, sweep
from megatrain.service.store.records import Checkpoint, SamplingSession
from megatrain.service.store.store import Store
from megatrain.service.work.futures import Futures
from megatrain.service.work.ledger import Ledger
from megatrain.service.work.run_state import RunState
from megatrain.service.work.sampling import SamplerState
from megatrain.service.work.ticket import Result

logger = logging.getLogger(__name__)


class Hub:
    """The service without HTTP."""

    def __init__(self, config: ServiceConfig) -> None:
        self.config = config
        self.folder = config.data.expanduser().resolve()
        self.deployments: dict[str, Deployment] = {}
        """By the name of the base model."""
        self.is_ready = self.is_draining = False
        self.began = time.time()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> str | None:
        """Open store, files and keys; return a first API key if there was none."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        url = self.config.database or f"sqlite:///{self.folder / 'service.db'}"
        self.store = await Store.open(url)
        self.files = await Files.open(self.config.files or str(self.folder / "files"), self.folder)
        self.signer = Signer(self.folder)
        self.auth = Authenticator(self.store, self.config)
        self.futures = Futures(self.store, self.config.limits, Ledger(self.auth))
        limits, times = self.config.limits, self.config.times
        self.sessions = Sessions(self.store, limits, times, self.session_over)
        self.intake = Intake(self.futures, self.deployments, self.auth)
        return await self.auth.first_key()

    async def start(self) -> None:
        """Start all ranks and samplers, and go on with what an earlier process has left.

        Raises what makes a model impossible to serve.
        """
        for served in self.config.models:
            self.deployments[served.name] = self._deployment(served)
        await asyncio.gather(*(each.start() for each in self.deployments.values()))
        await restore(self)
        for deployment in self.deployments.values():
            deployment.work()
        await self._end_what_is_over()
        self._tasks.append(asyncio.ensure_future(self._look_after()))
        self.is_ready = True

    async def _end_what_is_over(self) -> None:
        """Release what was taken up of sessions that have ended meanwhile."""
        left = {each for deployment in self.deployments.values() for each in deployment.sessions()}
        for session in left:
            if not self.sessions.is_alive(session):
                await self.session_over(session)

    def _deployment(self, served: ServedModel) -> Deployment:
        folder = self.folder / "models" / served.name.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        return Deployment(
            served,
            self.config,
            folder,
            futures=self.futures,
            store=self.store,
            files=self.files,
            fetch=self.fetch,
        )

    def check_ready(self) -> None:
        """Raise RankError, which clients take as a reason to try again, before all is started."""
        if not self.is_ready or self.is_draining:
            raise RankError(
                "the service is being " + ("ended" if self.is_draining else "started"),
                hint="try again in a few seconds",
            )

    def deployment(self, base_model: str) -> Deployment:
        """Return who serves a base model.  Raises NotFoundError."""
        if base_model not in self.deployments:
            raise NotFoundError(
                f"the model {base_model!r} is not served here; served: "
                f"{', '.join(self.deployments)}"
            )
        return self.deployments[base_model]

    async def checkpoint(self, project: str, path: str) -> Checkpoint:
        """Return a checkpoint that a project may read: its own, or a public one."""
        record = await self.store.read(checkpoints.readable(project, path))
        if record is None:
            raise NotFoundError(f"there is no checkpoint {path!r}")
        return record

    async def fetch(self, run: RunState, path: str) -> Path:
        """Return a local folder with a checkpoint's files for a run of its project."""
        record = await self.checkpoint(run.project, path)
        if record.base_model != run.record.base_model:
            raise StateError(
                f"{path} is of {record.base_model}, and this model is {run.record.base_model}"
            )
        if bool(record.lora.get("rank")) != run.record.is_lora:
            raise StateError(f"{path} is an adapter's or all parameters', and this model is not")
        if record.kind != "training":
            raise DataError(
                f"{path} holds no training state",
                hint="save_state makes one that training goes on from",
            )
        return await self.files.local_folder(record.location)

    async def open_sampler(
        self,
        project: str,
        session: str,
        sampler_id: str,
        base_model: str | None,
        model_path: str | None,
    ) -> SamplerState:
        """Begin to sample from a base model or saved weights; the same again for the same id."""
        for deployment in self.deployments.values():
            if (known := deployment.samplers.get(sampler_id)) is not None:
                return known
        named = base_model
        if model_path is not None:
            named = (await self.checkpoint(project, model_path)).base_model
        if named is not None and self.deployment(named).served.full_parameters:
            raise ConfigError(
                f"{named} is served for training all parameters, and not for sampling",
                hint="save_weights_for_sampler writes a checkpoint that any engine can serve",
            )
        if model_path is None:
            if base_model is None:
                raise DataError("a sampler needs a base_model or a model_path")
            deployment = self.deployment(base_model)
            state = SamplerState(
                SamplingSession(
                    id=sampler_id,
                    session=session,
                    project=project,
                    base_model=base_model,
                    created=time.time(),
                )
            )
        else:
            deployment, state = await self._open_named(project, session, sampler_id, model_path)
        await self.store.write(samplers.add(state.record))
        deployment.samplers[sampler_id] = state
        await self.check_alive(session)
        return state

    async def check_alive(self, session: str) -> None:
        """Raise NotFoundError, and give up what was begun, if a session ended meanwhile."""
        if not self.sessions.is_alive(session):
            await self.session_over(session)
            raise NotFoundError(f"session {session!r} is over")

    async def _open_named(
        self, project: str, session: str, sampler_id: str, path: str
    ) -> tuple[Deployment, SamplerState]:
        checkpoint = await self.checkpoint(project, path)
        if checkpoint.kind == "training":
            raise DataError(
                f"{path} is for training", hint="save_weights_for_sampler makes one for samplers"
            )
        deployment = self.deployment(checkpoint.base_model)
        folder = await self.files.local_folder(checkpoint.location)
        version = await deployment.named_version(checkpoint, folder)
        deployment.publisher.versions.hold(version)
        record = SamplingSession(
            id=sampler_id,
            session=session,
            project=project,
            base_model=checkpoint.base_model,
            model_path=path,
            version=checkpoint.step,
            directory=str(folder),
            kind="named",
            created=time.time(),
        )
        return deployment, SamplerState(record, version)

    async def session_over(self, session: str) -> None:
        """Give up what a session's client will not ask for any more."""
        for deployment in self.deployments.values():
            deployment.close_runs(session)  # or more would come while this is written down
        over = Result.of_error(StateError(f"session {session} is over"))
        left = [ticket for ticket in self.futures.open() if ticket.session == session]
        await self.futures.finish_all(left, over)
        for deployment in self.deployments.values():
            await deployment.release(session)

    async def _look_after(self) -> None:
        """Let what is over go, every so often; runs until cancelled."""
        while True:
            await asyncio.sleep(min(self.config.times.janitor_s, self.config.times.session_s / 4))
            try:
                await self.sessions.expire()
                await self.sweep()
            except MegatrainError as error:
                logger.warning("the janitor will try again: %s", error)
            except Exception:  # of files, say; sessions must expire all the same
                logger.exception("the janitor will try again")

    async def sweep(self) -> None:
        """Delete what has expired: results and checkpoints."""
        keep = Keep(result_s=self.config.times.result_s)
        await sweep(self.store, keep, time.time(), self.delete_checkpoint)
        self.futures.forget_before(time.monotonic() - self.config.times.result_s)
        for deployment in self.deployments.values():
            await asyncio.to_thread(deployment.loaded.sweep)

    async def delete_checkpoint(self, record: Checkpoint) -> None:
        """Delete a checkpoint: nobody finds it any more, then its files go."""
        await self.store.write(checkpoints.delete(record.path))
        await self.files.delete(record.location)

    async def drain(self) -> None:
        """Take nothing new, finish what runs; what is not done in time is done after a start."""
        self.is_draining = True
        self.futures.wake()
        for task in self._tasks:
            task.cancel()
        times = self.config.times
        await asyncio.gather(*(each.drain(times.drain_s) for each in self.deployments.values()))

    async def close(self) -> None:
        """End ranks and samplers, and close the store."""
        await asyncio.gather(*(each.close() for each in self.deployments.values()))
        await self.auth.flush()
        await self.store.close()
        self._lock.close()
