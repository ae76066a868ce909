"""What a rank process is told when it starts.  No torch."""

import json
import os
from dataclasses import asdict, dataclass, field

from megatrain.config.bus import BusConfig
from megatrain.parallel.layout import DeviceMesh

VARIABLE = "MEGATRAIN_RANK_OPTIONS"
"""Where a rank that was started by a driver finds them, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOptions:
    """How a rank joins the others, and where rank 0 listens."""

    listen: str
    mesh: DeviceMesh | None = None
    """None: all ranks are data parallel."""
    seed: int = 42
    platform: str = "auto"
    timeout_s: float = 1800.0
    """Of a collective."""
    bus: BusConfig = field(default_factory=BusConfig)
    rendezvous: str | None = None
    """A file by which ranks of one host find each other; None under torchrun."""
    dies_with_input: bool = False
    """End when standard input is closed."""

    def to_environment(self) -> dict[str, str]:
        """Return the variable that from_environment reads."""
        values = asdict(self) | {
            "mesh": None if self.mesh is None else self.mesh.to_dict(),
            "bus": self.bus.model_dump(mode="json"),
        }
        return {VARIABLE: json.dumps(values)}

    @classmethod
    def from_environment(cls) -> "RankOptions":
        """Return what to_environment made."""
        values = json.loads(os.environ[VARIABLE])
        mesh = values.pop("mesh")
        bus = BusConfig.model_validate(values.pop("bus"))
        return cls(**values, bus=bus, mesh=None if mesh is None else DeviceMesh(**mesh))
