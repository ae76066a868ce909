"""A run while this process knows it: its adapter on the ranks, and its queue."""

import re
from dataclasses import dataclass, field

from megatrain.service.store.records import Run
from megatrain.service.work.run_queue import RunQueue
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
    pass_tokens: int = 0
    """Tokens trained since the last step."""
    pass_loss: float = 0.0
    """Sum of the losses since the last step."""
    pass_seconds: float = 0.0
    live_since: int = -1
    """Step of the version that is live in the sampler, -1 without one."""
    last_error: str = ""
    closed: bool = False
    """No request is taken any more."""
    in_flight: set[str] = field(default_factory=set)
    """Ids of requests that were given to the ranks."""

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
