"""All that the page shows at once: a project's own things, and the health of what serves all.

Of what is others', only sums are told: tokens a second, requests that wait.
"""

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from importlib.metadata import version

from sqlalchemy import Connection

from megatrain.service.auth.principal import Principal
from megatrain.service.console.rates import Rates
from megatrain.service.console.view import (
    Json,
    checkpoint_row,
    mismatch_rows,
    rank_rows,
    run_row,
    sampler_row,
    version_rows,
)
from megatrain.service.deployment import Deployment
from megatrain.service.hub import Hub
from megatrain.service.publish.versions import Version
from megatrain.service.store import checkpoints, points, runs, sessions
from megatrain.service.store.records import Checkpoint, Run, Session
from megatrain.service.work.run_state import RunState

MISMATCHES = 50
"""Versions of a model whose mismatch is shown."""
MAX_SESSIONS = 10_000
"""Sessions that are kept in memory: what they are called does not change."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the database has of a project."""

    runs: list[Run]
    num_runs: int
    checkpoints: list[Checkpoint]
    num_checkpoints: int
    num_bytes: int
    sessions: dict[str, Session | None]
    losses: dict[str, float]


def kept(
    project: str, num_runs: int, num_checkpoints: int, known: Container[str]
) -> Callable[[Connection], Kept]:
    """Return a project's newest runs and checkpoints, and their sessions that are not known."""

    def read(connection: Connection) -> Kept:
        found, total = runs.list_page(project, num_runs, 0)(connection)
        saved, _ = checkpoints.list_page(project, limit=num_checkpoints)(connection)
        count, size = checkpoints.sizes(project)(connection)
        names = {run.session for run in found if run.session not in known}
        of = {name: sessions.get(project, name)(connection) for name in names}
        losses = points.last_losses(project, [run.id for run in found])(connection)
        return Kept(found, total, saved, count, size, of, losses)

    return read


class Overview:
    """What is to be seen of a hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._rates = hub, Rates()
        self._version = version("megatrain")
        self._sessions: dict[str, Session | None] = {}

    async def of(self, who: Principal, num_runs: int, num_checkpoints: int) -> Json:
        """Return what a key may see: of that, the newest runs and checkpoints."""
        hub = self._hub
        known = self._sessions
        found = await hub.store.read(kept(who.project, num_runs, num_checkpoints, known))
        known.update(found.sessions)
        if len(known) > MAX_SESSIONS:
            self._sessions = {}
        live = self._live()
        return {
            "service": self._service(who),
            "models": [self._model(each, who, found) for each in hub.deployments.values()],
            "runs": [
                run_row(
                    run,
                    self._state(run),
                    live.get(run.id),
                    known[run.session],
                    found.losses.get(run.id),
                )
                for run in found.runs
            ],
            "num_runs": found.num_runs,
            "checkpoints": [checkpoint_row(each) for each in found.checkpoints],
            "num_checkpoints": found.num_checkpoints,
            "num_bytes": found.num_bytes,
        }

    def _service(self, who: Principal) -> Json:
        return {
            "version": self._version,
            "began": self._hub.began,
            "ready": self._hub.is_ready and not self._hub.is_draining,
            "project": who.project,
            "key": who.name,
            "may": [scope for scope in ("train", "sample", "admin") if who.may(scope)],
        }

    def _live(self) -> dict[str, Version]:
        return {
            run: newest
            for deployment in self._hub.deployments.values()
            for run, newest in deployment.saves.live.items()
        }

    def _state(self, run: Run) -> RunState | None:
        deployment = self._hub.deployments.get(run.base_model)
        return None if deployment is None else deployment.scheduler.runs.get(run.id)

    def _model(self, deployment: Deployment, who: Principal, found: Kept) -> Json:
        fleet, scheduler = deployment.fleet, deployment.scheduler
        mine = [run for run in scheduler.runs.values() if run.project == who.project]
        is_own = _owner_of(found, mine)
        monitor = deployment.publisher.monitor
        beats = fleet.health.get("beats", [])
        return {
            "name": deployment.name,
            "arch": fleet.base.arch,
            "max_context_length": fleet.base.max_context_length,
            "can_sample": deployment.can_sample,
            "ready": fleet.is_ready,
            "error": fleet.error,
            "ranks": rank_rows(beats, fleet.served.ranks, with_hosts=who.may("admin")),
            "restarts": len(fleet.losses),
            "waiting": scheduler.num_waiting,
            "waiting_mine": sum(len(run.queue) for run in mine),
            "pending": fleet.num_pending,
            "sampling": deployment.sampling.running,
            "sampling_waiting": deployment.sampling.num_waiting,
            "sampler": sampler_row(deployment.sampler.status()),
            "trained_per_s": self._rate(deployment, "trained", deployment.training.trained_tokens),
            "sampled_per_s": self._rate(deployment, "sampled", deployment.sampled_tokens),
            "versions": version_rows(
                deployment.publisher.versions.list(), deployment.saves.live.values(), is_own
            ),
            "mismatch": mismatch_rows(monitor.figures(), is_own, MISMATCHES),
            "tolerance": monitor.tolerance,
        }

    def _rate(self, deployment: Deployment, kind: str, count: int) -> float:
        """Return tokens a second, as far as digits say something."""
        rate = self._rates.see(f"{kind} {deployment.name}", count, time.monotonic())
        return float(f"{rate:.3g}")


def _owner_of(found: Kept, alive: list[RunState]) -> Callable[[str], bool]:
    """Return what tells whether a version's source, a run or a path below one, is a project's."""
    mine = {run.id for run in found.runs} | {run.id for run in alive}
    mine |= {each.run for each in found.checkpoints}
    return lambda source: source.removeprefix("tinker://").partition("/")[0] in mine
