"""A status as rows of text: what both forms of `megatrain top` show."""

from typing import Any

from megatrain.cli.top.figures import count, duration, layout, memory, sparkline

SILENT_S = 2.0
"""Seconds of silence from which a rank stands out; beats come every second or more often."""

RANK_COLUMNS = ("rank", "host", "pid", "phase", "command", "for", "memory", "beat")
COMMAND_COLUMNS = ("command", "done", "failed", "cancelled", "/s", "p50", "p95")


def head(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Return name and text of the lines above the tables."""
    tokens, queue, restarts = status["tokens"], status["queue"], status["restarts"]
    hosts = {rank["host"] for rank in status["ranks"]}
    where = f"{len(status['ranks'])} rank(s) on {len(hosts)} host(s), {status['platform'] or '-'}"
    adapters = ", ".join(f"{tier} {number}" for tier, number in status["adapters"].items())
    return [
        ("driver", " · ".join(filter(None, (_state(status), where, layout(status["layout"]))))),
        (
            "tokens",
            f"{count(tokens['per_second'])}/s, {count(tokens['total'])} in all  "
            f"{sparkline(tokens['history'])}",
        ),
        ("queue", f"{queue['driver']} not answered, {queue['ranks']} of them wait on the ranks"),
        ("adapters", adapters or "-"),
        (
            "losses",
            f"{status['losses']['total']}, restarts {restarts['counted']} of "
            f"{restarts['allowed']} allowed",
        ),
    ]


def _state(status: dict[str, Any]) -> str:
    stale = status.get("stale_s")
    late = f", no answer for {duration(stale)}" if stale is not None else ""
    return f"{status['state']} for {duration(status['up_s'])}{late}"


def rank_row(rank: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a rank, by RANK_COLUMNS."""
    used = [rank["resident_bytes"], rank["device_bytes"]]
    return (
        str(rank["rank"]),
        rank["host"],
        str(rank["pid"]),
        "failed" if rank["failed"] else rank["phase"],
        f"{rank['command']} {rank['seq']}" if rank["command"] else "-",
        duration(rank["running_s"]) if rank["command"] else "-",
        " + ".join(memory(each) for each in used if each is not None),
        f"{rank['silent_s']:.1f} s",
    )


def is_troubled(rank: dict[str, Any]) -> bool:
    """Tell whether somebody should look at a rank."""
    return bool(rank["failed"]) or rank["silent_s"] > SILENT_S


def command_row(command: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a command, by COMMAND_COLUMNS."""
    return (
        command["name"],
        *(count(command[name]) for name in ("done", "failed", "cancelled", "per_second")),
        duration(command["p50_s"]),
        duration(command["p95_s"]),
    )


def losses(status: dict[str, Any]) -> list[str]:
    """Return what was said of the last losses."""
    found: list[str] = status["losses"]["last"]
    return found
