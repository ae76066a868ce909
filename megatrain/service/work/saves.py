"""Requests that write files: checkpoints to go on from, weights for samplers and to take away."""

import asyncio
import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatrain.bus.commands import Save
from megatrain.errors import SamplerError, StateError
from megatrain.service.files.files import Files
from megatrain.service.fleet.fleet import Fleet
from megatrain.service.publish.publisher import Publisher
from megatrain.service.publish.versions import Version
from megatrain.service.store import checkpoints, samplers
from megatrain.service.store.records import Checkpoint, SamplingSession
from megatrain.service.store.store import Change, Store
from megatrain.service.work.run_state import RunState
from megatrain.service.work.sampling import SamplerState
from megatrain.service.work.ticket import Result, Ticket

logger = logging.getLogger(__name__)

Done = tuple[Result, Sequence[Change]]

KINDS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
"""Of checkpoints: their part of a tinker:// path."""
PUBLISH_TRIES = 3
"""Samplers that a version is given to, if they are lost while they take it."""
UNKNOWN_S = 600.0
"""Seconds that ranks get to write a snapshot."""
KEPT_VERSIONS = 16
"""Versions of one run that samplers of earlier steps may still ask for."""


class Saves:
    """Does the requests of one base model that write files."""

    def __init__(
        self,
        fleet: Fleet,
        publisher: Publisher,
        files: Files,
        store: Store,
        publish_dir: Path,
        sampler_states: dict[str, SamplerState],
        *,
        max_checkpoints: int,
    ) -> None:
        """`max_checkpoints`: of one project."""
        self._fleet, self._publisher, self._files, self._store = fleet, publisher, files, store
        self._publish_dir = publish_dir
        self._samplers, self._max_checkpoints = sampler_states, max_checkpoints
        self.live: dict[str, Version] = {}
        """The newest version of each run that went live."""
        self._versions: dict[str, list[Version]] = {}

    async def training(self, run: RunState, ticket: Ticket) -> Done:
        """Save all that training needs to go on."""
        record = await self._checkpoint(run, ticket, "training")
        said = {"path": record.path, "type": "save_weights"}
        return Result.of_json(said), [checkpoints.put(record)]

    async def external(self, run: RunState, ticket: Ticket) -> Done:
        """Save an adapter to take away: in PEFT's format."""
        record = await self._checkpoint(run, ticket, "external")
        size = record.size_bytes
        said = {"path": record.path, "size_bytes": size, "type": "save_weights_external"}
        return Result.of_json(said), [checkpoints.put(record)]

    async def for_sampler(self, run: RunState, ticket: Ticket) -> Done:
        """Save an adapter for sampling: under a name, or for one sampling session."""
        content = ticket.content
        if content.get("path") is not None:
            saved = await self._checkpoint(run, ticket, "sampler")
            said = {"path": saved.path, "type": "save_weights_for_sampler"}
            return Result.of_json(said), [checkpoints.put(saved)]
        if not run.record.is_lora:
            raise StateError(
                "weights of all parameters are not sampled from here",
                hint="save them under a name: any engine can serve that checkpoint",
            )
        session = f"{run.record.session}:sample:{content['sampling_session_seq_id']}"
        version = await self.publish(run)
        kind = content.get("kind") or "snapshot"
        record = SamplingSession(
            id=session,
            session=run.record.session,
            project=run.project,
            base_model=run.record.base_model,
            model_path=None,
            run=run.id,
            version=version.step,
            directory=str(version.directory),
            kind=kind,
            created=time.time(),
        )
        self._samplers[session] = SamplerState(record, None if kind == "inflight" else version)
        said = {"sampling_session_id": session, "type": "save_weights_for_sampler"}
        return Result.of_json(said), [samplers.add(record)]

    async def publish(self, run: RunState) -> Version:
        """Bring a run's adapter, as it is on the ranks, to the sampler; it is live then.

        A sampler that is lost meanwhile is given it again.  Raises SamplerError.
        """
        for left in reversed(range(PUBLISH_TRIES)):
            try:
                version = await self._publish(run)
                break
            except SamplerError as error:
                if not left:
                    raise
                logger.warning("run %s is published again: %s", run.id, error.message)
        run.live_since = run.step
        self._make_live(run, version)
        return version

    async def _publish(self, run: RunState) -> Version:
        name = f"{run.adapter}-{run.step}-{uuid.uuid4().hex[:8]}"
        directory = self._publish_dir / name
        await self._fleet.do(Save(adapter=run.adapter, directory=str(directory)))
        version = Version(name, run.id, run.step, directory, is_owned=True)
        try:
            return await self._publisher.publish(version, run.adapter)
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            raise

    async def sweep(self) -> None:
        """Delete what an earlier process has published and no sampling session refers to.

        Not what is new: ranks that start anew may have to load it again until a snapshot is taken.
        """
        known = {version.directory for version in self._publisher.versions.list()}
        before = time.time() - UNKNOWN_S
        for each in await asyncio.to_thread(lambda: list(self._publish_dir.glob("*"))):
            if each not in known and each.stat().st_mtime < before:
                await asyncio.to_thread(shutil.rmtree, each, ignore_errors=True)

    def _make_live(self, run: RunState, version: Version) -> None:
        self.live[run.id] = version
        kept = self._versions.setdefault(run.id, [])
        kept.append(version)
        while len(kept) > KEPT_VERSIONS:
            self._publisher.versions.retire(kept.pop(0))

    def take_up(self, run_id: str, version: Version) -> None:
        """Know a version again that an earlier process had published."""
        if version.is_owned and version not in self._versions.setdefault(run_id, []):
            self._versions[run_id].append(version)
        newest = self.live.get(run_id)
        if newest is None or newest.step <= version.step:
            self.live[run_id] = version

    def forget(self, run: RunState) -> None:
        """Let all versions of a run go that nobody uses."""
        self.live.pop(run.id, None)
        for version in self._versions.pop(run.id, []):
            self._publisher.versions.retire(version)

    async def _checkpoint(self, run: RunState, ticket: Ticket, kind: str) -> Checkpoint:
        """Keep a checkpoint's files; its record is committed with the request's result, so that a
        process that dies in between leaves nothing that the next one would take for another's."""
        content: dict[str, Any] = ticket.content
        path = f"tinker://{run.id}/{KINDS[kind]}/{content['path']}"
        before = await self._store.read(checkpoints.get(run.project, path))
        if before is not None and not content.get("overwrite"):
            raise StateError(
                f"there is a checkpoint {path} already",
                hint="choose another name, delete it, or save with overwrite",
            )
        count, _ = await self._store.read(checkpoints.sizes(run.project))
        if before is None:
            check_number(count, self._max_checkpoints)
        key = key_of(path)
        folder = await self._save(run, with_optimizer=kind == "training")
        try:
            size = await self._files.put_folder(key, folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder.parent, ignore_errors=True)
        if ticket.result is not None:  # given up meanwhile: nobody would find them
            if before is None:
                await self._files.delete(key)
            raise StateError(f"{path} was not kept: its request was given up")
        now, ttl = time.time(), content.get("ttl_seconds")
        return Checkpoint(
            path=path,
            run=run.id,
            project=run.project,
            kind=kind,
            name=content["path"],
            created=now,
            size_bytes=size,
            public=False,
            user_metadata=content.get("user_metadata") or {},
            expires=None if ttl is None else now + ttl,
            base_model=run.record.base_model,
            lora={**run.record.lora, "rank": run.record.lora_rank},
            optimizer=run.record.optimizer,
            step=run.step,
            location=key,
            state="ready",
        )

    async def _save(self, run: RunState, *, with_optimizer: bool) -> Path:
        parent = await asyncio.to_thread(tempfile.mkdtemp, prefix="save-", dir=self._files.scratch)
        folder = Path(parent) / "checkpoint"
        command = Save(adapter=run.adapter, directory=str(folder), save_optimizer=with_optimizer)
        await self._fleet.do(command)
        return folder


def check_number(count: int, most: int) -> None:
    """Raise StateError for a project that has as many checkpoints as it may have."""
    if count >= most:
        raise StateError(
            f"this project has {count} checkpoints, which is all that it may have",
            hint="delete some, or give them a ttl",
        )


def key_of(path: str) -> str:
    """Return where a checkpoint's files are kept: its path without the scheme."""
    return path.removeprefix("tinker://").replace(":", "_")
