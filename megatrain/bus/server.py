"""Rank 0's door: one driver at a time, its commands in order, each accepted once.  No torch."""

import contextlib
import logging
import queue
import socket
import threading
from dataclasses import replace

from megatrain.bus.address import Address, keep_alive, server_context
from megatrain.bus.codec import Failure, encode
from megatrain.bus.commands import RestoreSnapshot
from megatrain.bus.frames import FrameSocket, Kind
from megatrain.bus.handshake import HANDSHAKE_S, Welcome, admit
from megatrain.bus.jobs import CANCELLED, SEQ, Job
from megatrain.bus.token import listening_token
from megatrain.config.bus import BusConfig
from megatrain.errors import BusError

logger = logging.getLogger(__name__)

MAX_STRANGERS = 16
"""Connections at once that have not proved yet that they have the token."""
FORGOTTEN_REPLY = encode(
    {
        "failure": Failure(
            "StateError",
            "the command was done, and its result is gone: a driver had confirmed it",
            "its effect is there; ask the ranks for what they hold",
        ),
        "forgotten": True,
    }
)
"""To a driver that asks again for what it had acknowledged."""
CANCELLED_REPLY = encode(
    {"failure": Failure("CancelledCommandError", "the command was cancelled before it began")}
)


class Server:
    """Listens on rank 0.  Threads of its own read; `reply` and `tell` may be called from any."""

    def __init__(self, address: Address, config: BusConfig, welcome: Welcome) -> None:
        """Listen.  Raises ConfigError, or OSError if the address is taken."""
        self.config, self._welcome = config, welcome
        self._token, self._tls = listening_token(address, config), server_context(config)
        self._lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(MAX_STRANGERS)
        self._driver: FrameSocket | None = None
        self._queue: queue.Queue[Job] = queue.Queue()
        self._cancelled: set[int] = set()
        self._replies: dict[int, bytes] = {}
        """Encoded frames that the driver may not have got."""
        self._session = ""
        self._last_seq = 0
        self._started = self._answered = 0
        self._listener = address.listen()
        host, port = self._listener.getsockname()[:2] if address.host else ("", 0)
        self.address = Address(address.path, address.host and str(host), int(port))
        threading.Thread(target=self._accept, name="bus-accept", daemon=True).start()

    def next(self, timeout_s: float) -> Job | None:
        """Return the next command; None if none came in time.  Cancelled ones are passed over."""
        while True:
            try:
                job = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                return None
            with self._lock:
                if job.session != self._session:
                    continue  # who asked for it will not come back
                self._started = max(self._started, job.seq)
                is_cancelled = job.seq in self._cancelled
                self._cancelled.discard(job.seq)
            if not is_cancelled:
                return job

    def queued(self) -> int:
        """Return how many commands wait."""
        return self._queue.qsize()

    def reply(self, job: Job, body: bytes) -> None:
        """Send a command's encoded reply, now or when the driver is back."""
        if SEQ.size + len(body) > self.config.max_message_bytes:
            body = encode({"failure": self._too_large(len(body))})
        frame = SEQ.pack(job.seq) + body
        with self._lock:
            if job.session != self._session or not job.seq:
                return  # who asked for it will not come back
            self._replies[job.seq] = frame
            self._answered = max(self._answered, job.seq)
            driver = self._driver
        self._send(driver, Kind.REPLY, frame)

    def _too_large(self, size: int) -> Failure:
        return Failure(
            "BusError",
            f"the command was done, but its result of {size} bytes is too large: a message must "
            f"have at most {self.config.max_message_bytes} bytes",
            hint="ask for less at once, or raise max_message_bytes on both ends",
            rank=0,
        )

    def tell(self, kind: Kind, body: bytes) -> None:
        """Send an encoded event, if a driver is there to hear it."""
        self._send(self._driver, kind, body)

    def _send(self, driver: FrameSocket | None, kind: Kind, body: bytes) -> None:
        if driver is None:
            return
        try:
            driver.send_encoded(kind, body)
        except BusError as error:
            logger.warning("%s", error.message)

    def close(self) -> None:
        """Stop listening and hang up."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # the thread that accepts gets an error
        self._listener.close()
        if self._driver is not None:
            self._driver.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            if not self._strangers.acquire(blocking=False):
                connection.close()  # too many at once that have not proved who they are
                continue
            threading.Thread(
                target=self._meet, args=(connection,), name="bus-driver", daemon=True
            ).start()

    def _meet(self, connection: socket.socket) -> None:
        """Admit a driver and read what it sends until it leaves."""
        try:
            link = self._greet(connection)
        finally:
            self._strangers.release()
        if link is None:
            return
        try:
            link.limit(None)
            while True:
                self._take(*link.receive_encoded(), link)
        except BusError as error:
            logger.info("the driver is gone: %s", error.message)
        finally:
            with self._lock:
                self._driver = None
            link.close()

    def _greet(self, connection: socket.socket) -> FrameSocket | None:
        """Return the connection of a driver that was let in; None if it was not."""
        connection.settimeout(HANDSHAKE_S)
        try:
            if connection.family != socket.AF_UNIX:
                keep_alive(connection)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            link = FrameSocket(connection, self.config.max_message_bytes)
            link.limit(HANDSHAKE_S)
            self._admit(link)
        except (BusError, OSError, TypeError, ValueError) as error:
            logger.warning("a connection was closed: %s", error)
            connection.close()
            return None
        return link

    def _admit(self, link: FrameSocket) -> None:
        """Let a driver in that has the token, unless another one is there."""
        try:
            admit(link, self._token, lambda session: self._welcome_to(session, link))
        except BaseException:
            with self._lock:
                if self._driver is link:
                    self._driver = None
            raise

    def _welcome_to(self, session: str, link: FrameSocket) -> Welcome:
        """Return who the ranks are to a driver; to another one than before, as if just started.

        It has proved that it has the token.  Raises BusError if another one is connected.
        """
        with self._lock:
            if self._driver is not None:
                raise BusError("another driver is connected")
            self._driver = link
            if session != self._session:
                is_first, self._session = not self._session, session
                self._last_seq = self._started = self._answered = 0
                self._replies, self._cancelled = {}, set()
                if not is_first:
                    forget = encode(RestoreSnapshot(directory=None))
                    self._queue.put(Job(0, RestoreSnapshot.deadline_s, forget, 0, session))
            epoch = f"{self._welcome.epoch}-{session}"
            return replace(self._welcome, epoch=epoch, last_seq=self._last_seq)

    def _take(self, kind: Kind, body: memoryview, link: FrameSocket) -> None:
        if kind is Kind.CANCEL and len(body) == SEQ.size:
            self._cancel(SEQ.unpack(body)[0], link)
            return
        job = Job.unpack(body, self._session) if kind is Kind.COMMAND else None
        if job is None:
            raise BusError(f"a driver must not send {kind.name} of {len(body)} bytes")
        with self._lock:
            for old in [each for each in self._replies if each <= job.acknowledged]:
                del self._replies[old]
            is_new, known = job.seq > self._last_seq, self._replies.get(job.seq)
            if is_new:
                self._last_seq = job.seq
                self._queue.put(job)
            elif known is None and job.seq <= self._answered:
                known = SEQ.pack(job.seq) + FORGOTTEN_REPLY
        if not is_new and known is not None:
            link.send_encoded(Kind.REPLY, known)

    def _cancel(self, seq: int, link: FrameSocket) -> None:
        with self._lock:
            in_time = self._started < seq <= self._last_seq
            if in_time:
                self._cancelled.add(seq)
                self._replies[seq] = SEQ.pack(seq) + CANCELLED_REPLY
        link.send_encoded(Kind.CANCEL, CANCELLED.pack(seq, in_time))
        if in_time:
            link.send_encoded(Kind.REPLY, SEQ.pack(seq) + CANCELLED_REPLY)
