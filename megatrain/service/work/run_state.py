"""A run while this process knows it: its adapter on the ranks, and its queue."""

import re
from dataclasses import dataclass, field

from megatrain.service.store.records import Run
from megatrain.service.work.run_queue import RunQueue
from megatrain.service.work.tally import Tally
from megatrain.service.work.ticket import Ticket


@dataclass(slots=True, eq=False)
class RunState:
    """What is known of a run now."""

    record: Run
    queue: RunQueue[Ticket]
    blocked: bool = False
    """Something runs that the next request has to wait for."""
    step: int = 0
    """Optimizer steps that were done."""
    tally: Tally = field(default_factory=Tally)
    """What was trained since the last step began."""
    counted: dict[str, Tally] = field(default_factory=dict)
    """Where passes count that have begun, by their requests' ids."""
    live_since: int = -1
    """Step of the version that is live in the sampler, -1 without one."""
    last_error: str = ""
    closed: bool = False
    """No request is taken any more."""
    in_flight: set[str] = field(default_factory=set)
    """Ids of requests that were given to the ranks."""

    def begin_pass(self, request_id: str) -> None:
        """Note that a pass counts for the next step; nothing happens if it was begun before."""
        if request_id not in self.counted:
            self.counted[request_id] = self.tally
            self.tally.begin()

    def end_pass(
        self, request_id: str, *, tokens: int = 0, loss: float = 0.0, seconds: float = 0.0
    ) -> None:
        """Count a pass; nothing happens if it was counted, or was none that trains."""
        tally = self.counted.pop(request_id, None)
        if tally is not None:
            tally.end(tokens, loss, seconds)

    def begin_step(self) -> Tally:
        """Return what the passes before a step train; later ones count for the next."""
        tally, self.tally = self.tally, Tally()
        return tally

    @property
    def id(self) -> str:
        """The run's id, which is its model's."""
        return self.record.id

    @property
    def project(self) -> str:
        """Whose it is."""
        return self.record.project

    @property
    def adapter(self) -> str:
        """Its adapter's name on the ranks."""
        return self.record.adapter


def adapter_name(run_id: str) -> str:
    """Return a name that the ranks take: letters, digits, '-' and '_'."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", run_id)
