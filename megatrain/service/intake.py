"""Requests on their way in: whose they are, in which order they are done, that they are kept."""

import time
import uuid
from typing import Any

from sqlalchemy.exc import IntegrityError

from megatrain.errors import BusyError, DataError, MegatrainError, NotFoundError, StateError
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.auth.principal import Principal
from megatrain.service.deployment import Deployment
from megatrain.service.fleet.whole import BASE
from megatrain.service.observe.note import about
from megatrain.service.store import runs
from megatrain.service.store.records import Run
from megatrain.service.work.futures import Futures
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.run_state import RunState, adapter_name
from megatrain.service.work.sampling import SamplerState
from megatrain.service.work.ticket import REFUSED, Result, Ticket, text_of

MAY_FOLLOW_AT_ONCE = frozenset({"forward_backward", "optim_step"})
"""What ranks redo in order after a loss."""


def is_barrier(kind: str, deployment: Deployment) -> bool:
    """Tell whether a run's next request waits for the end of one of a kind."""
    goes_live = kind == "optim_step" and deployment.served.sampler.live_every > 0
    return kind not in MAY_FOLLOW_AT_ONCE or goes_live


class Intake:
    """Accepts requests for runs and samplers."""

    def __init__(
        self, futures: Futures, deployments: dict[str, Deployment], auth: Authenticator
    ) -> None:
        self._futures, self._deployments, self._auth = futures, deployments, auth

    def run(self, project: str, run_id: str) -> tuple[Deployment, RunState]:
        """Return a run of a project that is on the ranks.  Raises NotFoundError."""
        for deployment in self._deployments.values():
            run = deployment.scheduler.runs.get(run_id)
            if run is not None and run.project == project and not run.closed:
                return deployment, run
        raise NotFoundError(
            f"there is no model {run_id!r} on the ranks",
            hint="a session that ended has given its models back: create one from a checkpoint",
        )

    def seq(self, project: str, run_id: str, given: int | None) -> int:
        """Return a request's number: the one given, or the one after all that came."""
        if given is not None:
            return given
        return self.run(project, run_id)[1].queue.last + 1

    def sampler(self, project: str, session_id: str) -> tuple[Deployment, SamplerState]:
        """Return a sampling session of a project.  Raises NotFoundError."""
        for deployment in self._deployments.values():
            state = deployment.samplers.get(session_id)
            if state is not None and state.record.project == project:
                return deployment, state
        raise NotFoundError(f"there is no sampling session {session_id!r}")

    async def create(
        self,
        principal: Principal,
        deployment: Deployment,
        record: Run,
        kind: str,
        content: Any,
        payload: bytes,
        *,
        max_runs: int,
    ) -> Ticket:
        """Accept a run's first request, which makes its adapter."""
        idem = f"train:{record.id}:0"
        if (before := await self._futures.known(principal.project, idem)) is not None:
            return before
        there = [run for run in deployment.scheduler.runs.values() if not run.closed]
        mine = sum(run.project == principal.project for run in there)
        if mine >= max_runs:
            raise BusyError(
                f"this project has {mine} models on the ranks",
                hint="end sessions that are done",
                retry_after_s=30.0,
            )
        run = RunState(record, RunQueue(0))
        ticket = self._ticket(principal, kind, record.session, idem, content, payload)
        ticket.run, ticket.reply = record.id, {"model_id": record.id}
        try:
            accepted = await self._futures.accept(ticket, runs.add(record))
        except IntegrityError:  # the request that made it is forgotten by now
            raise StateError(
                f"there is a model {record.id} already", hint="give the new one another number"
            ) from None
        if accepted is ticket:
            deployment.scheduler.runs[record.id] = run
            deployment.scheduler.put(run, ticket)
        return accepted

    async def train(
        self,
        principal: Principal,
        kind: str,
        run_id: str,
        seq: int,
        content: Any,
        payload: bytes,
        tokens: int = 0,
    ) -> Ticket:
        """Accept one of a run's later requests; `content` may be what is wrong with it."""
        idem = f"train:{run_id}:{seq}"
        is_new = self._is_new(principal.project, run_id, seq)
        before = await self._futures.known(principal.project, idem, is_new=is_new)
        if before is not None:
            return _same(before, kind)
        deployment, run = self.run(principal.project, run_id)
        ticket = self._ticket(principal, kind, run.record.session, idem, content, payload)
        ticket.run, ticket.seq, ticket.tokens = run_id, seq, tokens
        ticket.base_model = deployment.name
        ticket.reply = {"model_id": run_id}
        ticket.is_barrier = is_barrier(kind, deployment)
        accepted = await self._charged(principal, ticket)
        if accepted is not ticket:
            return _same(accepted, kind)
        if run.closed:  # while this was committed
            error = StateError(f"the model {run_id} was given back")
            await self._futures.finish(ticket, Result.of_error(error))
        elif not deployment.scheduler.put(run, ticket):
            error = StateError(f"request {seq} of this model is over: number it anew")
            await self._futures.finish(ticket, Result.of_error(error))
        return accepted

    async def _charged(self, principal: Principal, ticket: Ticket) -> Ticket:
        """Accept a request that is counted against its project's day, once however often it comes.

        Raises BusyError where that is used up, or too much waits.
        """
        if not ticket.tokens:
            return await self._futures.accept(ticket)
        self._futures.check_room(ticket.project)
        is_refused = isinstance(ticket.content, MegatrainError)
        ticket.charge = await self._auth.spend(principal, 0 if is_refused else ticket.tokens)
        try:
            accepted = await self._futures.accept(ticket)
        except IntegrityError:  # it came, and was finished, while the day's count was read
            self._uncharge(ticket)
            before = await self._futures.known(ticket.project, ticket.idem)
            if before is None:
                raise
            return before
        except Exception:
            self._uncharge(ticket)
            raise
        if accepted is not ticket:
            self._uncharge(ticket)
        return accepted

    def _uncharge(self, ticket: Ticket) -> None:
        charge, ticket.charge = ticket.charge, None
        if charge is not None:
            self._auth.settle(charge, 0)

    def _is_new(self, project: str, run_id: str, seq: int) -> bool:
        """Tell whether a run's queue has seen no number so great: then the database has it not."""
        try:
            return seq > self.run(project, run_id)[1].queue.last
        except NotFoundError:
            return False

    async def sample(
        self,
        principal: Principal,
        session_id: str,
        seq: int,
        content: Any,
        payload: bytes,
        tokens: int,
    ) -> Ticket:
        """Accept a sampling request; `content` may be what is wrong with it."""
        idem = f"sample:{session_id}:{seq}"
        if (before := await self._futures.known(principal.project, idem)) is not None:
            return before
        deployment, state = self.sampler(principal.project, session_id)
        session = state.record.session
        ticket = self._ticket(principal, "sample", session, idem, content, payload)
        ticket.sampler, ticket.seq, ticket.tokens = session_id, seq, tokens
        ticket.base_model = deployment.name
        accepted = await self._charged(principal, ticket)
        if accepted is not ticket:
            return accepted
        if isinstance(content, MegatrainError):
            await self._futures.finish(ticket, Result.of_error(content))
        else:
            deployment.sampling.put(state, ticket)
        return accepted

    def _ticket(
        self,
        principal: Principal,
        kind: str,
        session: str,
        idem: str,
        content: Any,
        payload: bytes,
    ) -> Ticket:
        about(project=principal.project)
        return Ticket(
            id=str(uuid.uuid4()),
            kind=kind,
            project=principal.project,
            key_id=principal.key_id,
            session=session,
            idem=idem,
            content=content,
            payload=kept_refusal(content) if isinstance(content, MegatrainError) else payload,
        )


def kept_refusal(error: MegatrainError) -> bytes:
    """Return what is kept of a request that is refused when its turn comes: why, not what it was.

    A process that takes it up need not find that out anew.
    """
    return REFUSED + text_of(error).encode(errors="backslashreplace")


def refusal_of(payload: bytes) -> DataError | None:
    """Return why a request that was kept is to be refused, if it is."""
    return DataError(payload[1:].decode()) if payload[:1] == REFUSED else None


def _same(before: Ticket, kind: str) -> Ticket:
    """Return the request that came before with the same number, if it is of the same kind."""
    if before.kind != kind:
        raise StateError(
            f"request {before.seq} of this model is its {before.kind}, and no {kind}",
            hint="number a run's requests one after the other",
        )
    return before


def new_run(  # noqa: PLR0913 - a record has many fields
    session: str,
    seq: int,
    project: str,
    base_model: str,
    *,
    lora: dict[str, Any] | None,
    optimizer: dict[str, Any],
    user_metadata: dict[str, Any],
    source: str | None = None,
) -> Run:
    """Return the record of a run that is to be made; without `lora` it trains all parameters."""
    run_id = f"{session}:train:{seq}"
    now = time.time()
    return Run(
        id=run_id,
        session=session,
        project=project,
        base_model=base_model,
        adapter=BASE if lora is None else adapter_name(run_id),
        is_lora=lora is not None,
        lora_rank=0 if lora is None else int(lora["rank"]),
        lora={} if lora is None else {key: lora[key] for key in lora if key != "rank"},
        optimizer=optimizer,
        user_metadata=user_metadata,
        created=now,
        last_request=now,
        source=source,
    )
