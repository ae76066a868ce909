"""What an operator sees of the service: metrics, traces, logs, health.

What other parts of the service count with (note, spent, timing, series) knows none of them; what
looks at them (collector, router) knows them by protocols.
"""
