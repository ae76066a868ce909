"""Log lines as JSON, one object a line, with what the request is about."""

import json
import logging
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

from megatrain.log import setup_logging
from megatrain.service.observe.note import current

Format = Literal["text", "json"]
Clean = Callable[[str], str]


class JsonFormatter(logging.Formatter):
    """Makes an object of a record: time, level, logger, message, and of the request, if it is for
    one, request, project, run, trace_id and span_id."""

    def __init__(self, clean: Clean) -> None:
        """`clean` takes secrets out of a text."""
        super().__init__()
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        when = datetime.fromtimestamp(record.created, UTC)
        said: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self._clean(record.getMessage()),
            **self._about(),
        }
        said |= getattr(record, "fields", {})
        if record.exc_text or record.exc_info:
            said["exception"] = self._clean(record.exc_text or _traceback(record))
        return json.dumps(said, ensure_ascii=False, default=str)

    def _about(self) -> dict[str, str]:
        note = current()
        if note is None:
            return {}
        found = {
            "request": self._clean(note.request),
            "project": note.project,
            "run": note.run,
            "trace_id": note.trace_id,
            "span_id": note.span_id,
        }
        return {name: value for name, value in found.items() if value}


def _traceback(record: logging.LogRecord) -> str:
    if not isinstance(record.exc_info, tuple) or record.exc_info[1] is None:
        return ""
    return "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")


def setup_logs(form: Format, clean: Clean) -> None:
    """Set up the log of a service: text as everywhere, or JSON, others' warnings included."""
    setup_logging()
    if form == "text":
        return
    formatter = JsonFormatter(clean)
    for handler in logging.getLogger("megatrain").handlers:
        handler.setFormatter(formatter)
    rest = logging.StreamHandler(sys.stderr)
    rest.setFormatter(formatter)
    rest.setLevel(logging.WARNING)
    logging.getLogger().addHandler(rest)
    logging.captureWarnings(True)
