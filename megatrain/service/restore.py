"""What a new process takes up of an earlier one: sessions, runs, samplers, requests."""

import json
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

from megatrain.config.service import Limits, ServiceConfig
from megatrain.errors import MegatrainError, StateError
from megatrain.service.deployment import Deployment
from megatrain.service.fleet.base_model import BaseModel
from megatrain.service.fleet.whole import BASE
from megatrain.service.intake import is_barrier, refusal_of
from megatrain.service.publish.versions import Version
from megatrain.service.sessions import Sessions
from megatrain.service.store import requests, runs, samplers, sessions
from megatrain.service.store.records import Request, Run, SamplingSession
from megatrain.service.store.store import Store
from megatrain.service.wire.bodies import parse_json, parse_model
from megatrain.service.wire.passes import decode_pass, json_to_pass
from megatrain.service.wire.sampling import to_sample_request
from megatrain.service.wire.schema import SampleBody
from megatrain.service.work.futures import Futures
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState
from megatrain.service.work.sampling import SamplerState
from megatrain.service.work.scheduler import SEPARATOR
from megatrain.service.work.ticket import Result, Ticket

logger = logging.getLogger(__name__)


class Left(Protocol):
    """What is needed to take it up."""

    store: Store
    futures: Futures
    sessions: Sessions
    config: ServiceConfig
    deployments: dict[str, Deployment]


def content_of(kind: str, payload: bytes, limits: Limits, base: BaseModel) -> Any:
    """Return a request, parsed, or what is wrong with it; JSON begins with a brace."""
    if (refused := refusal_of(payload)) is not None:
        return refused
    try:
        if kind in ("forward_backward", "forward"):
            if payload[:1] == b"{":
                return json_to_pass(parse_json(payload), limits, forward_only=kind == "forward")
            return decode_pass(payload, limits)
        if kind != "sample":
            return json.loads(payload)
        return to_sample_request(
            parse_model(SampleBody, payload),
            limits,
            vocab_size=base.vocab_size,
            max_context_length=base.max_context_length,
        )
    except MegatrainError as error:
        return error


async def restore(hub: Left) -> None:
    """Take up what is not over.  The ranks are there, and have their adapters."""
    hub.sessions.restore(await hub.store.read(sessions.active()))
    found: list[Run] = await hub.store.read(runs.live())
    waiting: list[Request] = await hub.store.read(requests.open_requests())
    by_run: dict[str, list[Request]] = defaultdict(list)
    for request in waiting:
        by_run[request.run or ""].append(request)
    for name, deployment in hub.deployments.items():
        mine = [run for run in found if run.base_model == name]
        await _restore_runs(hub, deployment, mine, by_run)
        await _restore_samplers(hub, deployment)
        await deployment.saves.sweep()
    await _restore_samples(hub, [request for request in waiting if request.kind == "sample"])
    known = {run.id for run in found if run.base_model in hub.deployments}
    for request in waiting:
        if request.kind != "sample" and request.run not in known:
            await _give_up(hub, request, StateError(f"the model {request.run} was given back"))
    logger.info("took up %d runs and %d requests", len(found), len(waiting))


async def _restore_runs(
    hub: Left, deployment: Deployment, found: list[Run], by_run: dict[str, list[Request]]
) -> None:
    fleet = deployment.fleet
    held = set((await fleet.inspect())["adapters"].get("model", ()))
    tags = {each: tag for tag in fleet.adopted_tags() for each in tag.split(SEPARATOR)}
    taken: set[str] = set()
    for record in found:
        requests_of = by_run.get(record.id, [])
        # The base is held for one run alone, which others have asked for in vain.
        is_begun = record.adapter in held and (record.is_lora or record.state == "live")
        if not hub.sessions.is_alive(record.session):
            await _over(hub, deployment, record, requests_of, is_begun)
            continue
        if not is_begun and not any(each.seq == 0 for each in requests_of):
            await _lost(hub, record, requests_of)
            continue
        if is_begun and record.adapter == BASE:
            fleet.whole.take(record.id)
        run = RunState(record, await _queue(hub, record, requests_of), step=record.step)
        deployment.scheduler.runs[run.id] = run
        for request in requests_of:
            base = deployment.fleet.base
            content = content_of(request.kind, request.payload, hub.config.limits, base)
            ticket = hub.futures.take_up(request, content)
            ticket.base_model = deployment.name
            ticket.is_barrier = is_barrier(request.kind, deployment)
            ticket.tag = tags.get(ticket.id, "")
            taken.add(ticket.id)
            deployment.scheduler.put(run, ticket)
    for tag in fleet.adopted_tags():  # answered before, or given up since
        if not any(each in taken for each in tag.split(SEPARATOR)):
            fleet.confirm(tag)


async def _queue(hub: Left, record: Run, waiting: list[Request]) -> RunQueue[Ticket]:
    """Return a run's queue, which knows what is over: requests are begun in order, so a number
    below one that is finished, and that does not wait itself, was given up as a gap."""
    first = min([record.next_seq, *(each.seq for each in waiting)])
    done = await hub.store.read(requests.finished_seqs(record.id, first))
    last = max(done, default=first - 1)
    if not any(each.seq < last for each in waiting):
        return RunQueue(last + 1)
    return RunQueue(first, done=done)


async def _over(
    hub: Left, deployment: Deployment, run: Run, waiting: list[Request], is_begun: bool
) -> None:
    """Finish the end of a run whose session was over before the process before this one was."""
    for request in waiting:
        await _give_up(hub, request, StateError(f"session {run.session} is over"))
    if is_begun:
        try:
            if run.adapter == BASE:
                deployment.fleet.whole.take(run.id)
            await deployment.fleet.let_go(run)
        except MegatrainError as error:  # no reason not to start
            logger.warning("run %s: its adapter stays on the ranks: %s", run.id, error)
    await hub.store.write(runs.set_state(run.id, "released"))


async def _lost(hub: Left, run: Run, waiting: list[Request]) -> None:
    """Give up a run whose adapter the ranks do not have."""
    logger.warning("run %s: its adapter is not on the ranks any more", run.id)
    await hub.store.write(runs.set_state(run.id, "failed"))
    error = StateError(
        f"the ranks do not have the adapter of {run.id} any more",
        hint="create a model from its last checkpoint",
    )
    for request in waiting:
        await _give_up(hub, request, error)


async def _give_up(hub: Left, request: Request, error: MegatrainError) -> None:
    ticket = hub.futures.take_up(request, None)
    await hub.futures.finish(ticket, Result.of_error(error))


async def _restore_samplers(hub: Left, deployment: Deployment) -> None:
    found: list[SamplingSession] = await hub.store.read(samplers.active(deployment.name))
    loaded: dict[str, Version] = {}
    for record in found:
        if record.directory is None:
            deployment.samplers[record.id] = SamplerState(record)
            continue
        if record.directory not in loaded:
            version = await _reload(deployment, record)
            if version is None:
                continue
            loaded[record.directory] = version
        version = loaded[record.directory]
        pinned = None if record.kind == "inflight" else version
        deployment.samplers[record.id] = SamplerState(record, pinned)
        if record.run is not None:
            deployment.saves.take_up(record.run, version)


async def _reload(deployment: Deployment, record: SamplingSession) -> Version | None:
    """Let the sampler load a version that an earlier process had published."""
    directory = Path(str(record.directory))
    if not (directory / "adapter_config.json").is_file():
        logger.warning("sampling session %s: its weights are gone", record.id)
        return None
    is_owned = record.model_path is None
    name = f"{directory.name}-{os.getpid()}" if not is_owned else directory.name
    version = Version(name, record.run or record.id, record.version or 0, directory, is_owned)
    try:
        await deployment.publisher.load_checkpoint(version)
    except MegatrainError as error:
        logger.warning("sampling session %s: %s", record.id, error)
        return None
    if not is_owned:
        deployment.publisher.versions.hold(version)
    return version


async def _restore_samples(hub: Left, waiting: list[Request]) -> None:
    states = {
        key: (deployment, state)
        for deployment in hub.deployments.values()
        for key, state in deployment.samplers.items()
    }
    for request in waiting:
        if request.sampler not in states:
            error = StateError(f"sampling session {request.sampler} is over")
            await _give_up(hub, request, error)
            continue
        ticket = hub.futures.take_up(request, None)
        deployment, state = states[request.sampler]
        ticket.base_model = deployment.name
        base = deployment.fleet.base
        ticket.content = content_of("sample", request.payload, hub.config.limits, base)
        if isinstance(ticket.content, MegatrainError):
            await hub.futures.finish(ticket, Result.of_error(ticket.content))
        else:
            deployment.sampling.put(state, ticket)
