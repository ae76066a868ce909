"""What a driver's options ask for: metrics with their port, and traces.  No torch.

Neither costs an import unless it is asked for.
"""

from contextlib import ExitStack

from megatrain.bus.telemetry.watched import Watched


class Telemetry:
    """Watches one driver, from before it has ranks until it is closed."""

    def __init__(self, driver: Watched) -> None:
        self._driver, self._open = driver, ExitStack()
        self.metrics_url: str | None = None
        """Where /metrics and /status are."""

    def open(
        self, *, metrics_port: int | None, traces: bool, metrics_host: str = "127.0.0.1"
    ) -> None:
        """Begin.  Raises BusError if the port is taken, PlatformError without OpenTelemetry."""
        if traces:
            from megatrain.bus.telemetry.traces import BusTraces  # noqa: PLC0415 - an extra

            self._open.callback(BusTraces(self._driver).close)
        if metrics_port is not None:
            from megatrain.bus.telemetry.endpoint import serve_metrics  # noqa: PLC0415 - optional
            from megatrain.bus.telemetry.metrics import BusMetrics  # noqa: PLC0415

            metrics = BusMetrics(self._driver)
            self._open.callback(metrics.close)
            endpoint = serve_metrics(metrics, metrics_host, metrics_port)
            self._open.callback(endpoint.close)
            self.metrics_url = endpoint.url

    def close(self) -> None:
        """Watch no longer; idempotent."""
        self._open.close()
