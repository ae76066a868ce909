"""How a driver and its ranks talk, how long they wait, and what happens when a rank is lost."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt


class RecoveryPolicy(BaseModel):
    """What is done when ranks are lost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_restarts: NonNegativeInt = 3
    """Restarts of the ranks before the driver gives up; 0 never restarts."""
    max_attempts: PositiveInt = 2
    """Times that ranks may be lost in the same way over one command; it alone is given up then."""
    restart_timeout_s: PositiveFloat = 300.0
    """Seconds that ranks get to start again, by themselves under torchrun."""
    snapshot_every_commands: PositiveInt = 200
    """Commands that change something, after which a snapshot is taken."""
    snapshot_every_s: PositiveFloat = 600.0
    """Seconds after which one is taken if anything has changed."""
    reset_after_s: PositiveFloat = 3600.0
    """Seconds without a loss after which earlier restarts no longer count."""


class BusConfig(BaseModel):
    """Options of a driver; those of the connection are a worker's too."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    token_file: Path | None = None
    """A file with the secret that both ends of a TCP connection share.  None: this user's own,
    `~/.config/megatrain/token`, which a worker makes if it is not there."""
    certificate: Path | None = None
    """PEM of the worker's certificate: a worker shows it, a driver accepts this one alone."""
    private_key: Path | None = None
    """PEM of the worker's key, on the worker only."""
    max_message_bytes: int = Field(default=2 << 30, ge=1 << 16)
    """Cap of one message in either direction."""
    heartbeat_timeout_s: PositiveFloat = 4.0
    """Seconds without a sign of life after which a rank counts as lost; it is named within another
    half second."""
    connect_timeout_s: PositiveFloat = 120.0
    """Seconds that ranks get to start, and a driver to reach them."""
    max_queued: PositiveInt = 256
    """Commands that may wait on the ranks; the next one waits in the driver."""
    fork_ranks: bool = False
    """Fork the ranks of this host from one process that has imported Megatron: they start, and
    start again, in less than a second.  On processors only."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of /metrics (Prometheus) and /status (`megatrain top`) of the driver; 0 is any."""
    metrics_host: str = "127.0.0.1"
    """Where that port listens: this host alone unless told otherwise; it asks for no token."""
    traces: bool = False
    """A span of OpenTelemetry for each command, with the provider that the script has set."""
    journal: Path | None = None
    """Folder of the journal and the snapshots; needed to go on after the driver's own death, and
    where ranks are on several hosts it must be one that all of them see.  None: a temporary one."""
    recovery: RecoveryPolicy = RecoveryPolicy()
