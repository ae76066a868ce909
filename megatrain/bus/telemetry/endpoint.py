"""A small HTTP server: /metrics for Prometheus, /status for `megatrain top`.  No torch."""

import ipaddress
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from megatrain.bus.telemetry import running
from megatrain.bus.telemetry.metrics import BusMetrics
from megatrain.bus.telemetry.status import make_status
from megatrain.errors import BusError

logger = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds that a client gets to say what it wants."""

App = Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]


class Endpoint:
    """Serves one driver's metrics from a thread until it is closed."""

    def __init__(self, metrics: BusMetrics, host: str, port: int) -> None:
        """Listen.  Raises BusError if the address is taken, or is none of this host's."""
        try:
            family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            kind = type("Server", (ThreadingWSGIServer,), {"address_family": family})
            app = _app(metrics, is_local=_is_loopback(str(found[0])))
            self._server: WSGIServer = make_server(str(found[0]), port, app, kind, _Handler)
        except (OSError, OverflowError) as error:
            raise BusError(
                f"metrics cannot be served at {host}:{port}: {error}",
                hint="metrics_port=0 takes any port that is free",
            ) from error
        address = f"[{host}]" if ":" in host else host
        self.url = f"http://{address}:{self._server.server_port}"
        if not _is_loopback(str(found[0])):
            logger.warning("%s/metrics can be read by whoever reaches this port", self.url)
        self._file = running.announce(self.url, self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="bus-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop; the port is free then.  Idempotent."""
        running.withdraw(self._file)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def serve_metrics(metrics: BusMetrics, host: str = "127.0.0.1", port: int = 0) -> Endpoint:
    """Serve a driver's metrics, on this host alone unless told otherwise; port 0 is any free one.

    Raises BusError if the address is taken.
    """
    endpoint = Endpoint(metrics, host, port)
    logger.info("metrics at %s/metrics, live view: megatrain top %s", endpoint.url, endpoint.url)
    return endpoint


class _Handler(WSGIRequestHandler):
    """Says nothing of requests, and does not wait for ever for one."""

    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _app(metrics: BusMetrics, *, is_local: bool) -> App:
    prometheus: App = make_wsgi_app(metrics.registry)

    def app(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        # A page in this host's browser may give its own name this address, and read what is here.
        if is_local and not _names_this_host(environ.get("HTTP_HOST", "")):
            return _answer(start, "403 Forbidden", "only for this host's own names\n")
        if environ["REQUEST_METHOD"] != "GET":
            return _answer(start, "405 Method Not Allowed", "GET only\n")
        match environ["PATH_INFO"]:
            case "/metrics":
                return prometheus(environ, start)
            case "/status":
                text = json.dumps(make_status(metrics))
                return _answer(start, "200 OK", text, "application/json")
            case _:
                return _answer(start, "404 Not Found", "here are /metrics and /status\n")

    return app


def _answer(start: StartResponse, status: str, text: str, kind: str = "text/plain") -> list[bytes]:
    body = text.encode()
    start(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]


def _names_this_host(header: str) -> bool:
    """Tell whether a request was made to this host by a name that nobody else can give."""
    host = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return host in ("", "localhost") or _is_loopback(host.strip("[]"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
