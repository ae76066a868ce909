"""What a driver shows of itself: Prometheus metrics, OpenTelemetry spans, and a status."""
