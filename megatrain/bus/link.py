"""A driver's connection to rank 0, with a thread that reads it.  No torch."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from megatrain.bus.address import Address
from megatrain.bus.codec import decode
from megatrain.bus.frames import FrameSocket, Kind
from megatrain.bus.handshake import HANDSHAKE_S, Welcome, enter
from megatrain.bus.jobs import CANCELLED, SEQ
from megatrain.bus.token import driving_token
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError, ConfigError
from megatrain.parallel.layout import DeviceMesh

logger = logging.getLogger(__name__)


class Link:
    """A connection over which the driver was let in."""

    def __init__(self, address: Address, config: BusConfig, session: str) -> None:
        """Connect.  Raises OSError if nobody listens, BusError if the driver is refused."""
        connection = address.connect(config, HANDSHAKE_S)
        self._frames = FrameSocket(connection, config.max_message_bytes)
        self._frames.limit(HANDSHAKE_S)
        try:
            self.welcome: Welcome = enter(self._frames, driving_token(address, config), session)
        except BaseException:
            self._frames.close()
            raise
        self._frames.limit(None)
        self.error: BusError | None = None
        """Why it ended."""
        self.lost: dict[str, Any] | None = None
        """What rank 0 said of ranks that cannot go on."""
        self.health: dict[str, Any] = {}
        """The last beats of all ranks, and how many commands wait."""

    @property
    def heard_at(self) -> float:
        """When rank 0 was heard last, on time.monotonic's clock."""
        return self._frames.heard_at

    @heard_at.setter
    def heard_at(self, value: float) -> None:
        self._frames.heard_at = value

    def check_mesh(self, mesh: DeviceMesh | None) -> DeviceMesh:
        """Return the ranks' mesh.  Hangs up and raises ConfigError if it is not the one given."""
        theirs = DeviceMesh(**self.welcome.mesh)
        if mesh is not None and mesh != theirs:
            self.close()
            raise ConfigError(
                f"the ranks are laid out as {theirs.describe()}, not as {mesh.describe()}",
                hint="leave global_device_mesh out, or start them with that mesh",
            )
        return theirs

    def listen(
        self, reply: Callable[[int, Any, int], None], cancelled: Callable[[int, bool], None]
    ) -> None:
        """Hand every reply, and every answer to a cancellation, on from a thread."""
        threading.Thread(
            target=self._listen, args=(reply, cancelled), name="bus-link", daemon=True
        ).start()

    def _listen(
        self, reply: Callable[[int, Any, int], None], cancelled: Callable[[int, bool], None]
    ) -> None:
        try:
            while True:
                kind, body = self._frames.receive_encoded()
                match kind:
                    case Kind.REPLY:
                        reply(SEQ.unpack_from(body)[0], decode(body[SEQ.size :]), len(body))
                    case Kind.CANCEL:
                        cancelled(*CANCELLED.unpack(body))
                    case Kind.HEALTH:
                        self.health = decode(body)
                    case Kind.LOST:
                        self.lost = decode(body)
                    case _:
                        raise BusError(f"ranks must not send {kind.name}")
        except BusError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - whatever bytes may make of what reads them
            self.error = BusError(f"the ranks said what makes no sense: {error!r}")
        finally:
            self._frames.close()

    def send(self, kind: Kind, body: bytes) -> None:
        """Send an encoded frame.  Raises BusError."""
        self._frames.send_encoded(kind, body)

    def close(self) -> None:
        """Hang up."""
        self._frames.close()


def reach(
    address: Address,
    config: BusConfig,
    session: str,
    timeout_s: float,
    check: Callable[[], None],
) -> Link:
    """Return a connection to rank 0, as soon as it listens.

    `check` raises what makes waiting useless.  Raises BusError if nobody listens in time, or the
    driver is refused.
    """
    limit = time.monotonic() + timeout_s
    while True:
        check()
        try:
            return Link(address, config, session)
        except OSError as error:
            refused = isinstance(error, BusError) and "refused" in str(error)
            if refused or time.monotonic() > limit:
                if isinstance(error, BusError):
                    raise
                raise BusError(
                    f"no ranks listen at {address} after {timeout_s:g} s: {error}",
                    hint="start them with megatrain worker --listen",
                ) from error
        time.sleep(0.05)
