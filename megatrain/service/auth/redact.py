"""Keeps keys out of logs: out of messages, and out of the tracebacks below them."""

import logging
import re
import traceback
from collections.abc import Callable
from typing import Any

_SECRET = re.compile(
    r"tml-[A-Za-z0-9_\-]{6,}"
    r"|(?<![A-Za-z])[Bb]earer\s+[^\s'\",]{8,}"
    r"|eyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-.]+"
)

_Factory = Callable[..., logging.LogRecord]


def redacted(text: str) -> str:
    """Return a text without the API keys, bearer tokens and JWTs that are in it."""
    return _SECRET.sub("[secret]", text)


def clean_record(record: logging.LogRecord) -> None:
    """Take secrets out of a record's message and of its traceback."""
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # its formatter will say what is wrong with it
        return
    clean = redacted(text)
    if clean != text:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        text = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
        clean = redacted(text)
        if clean != text:
            # Formatters take the text where there is one; without exc_info none looks further.
            record.exc_text, record.exc_info = clean, None


def keep_secrets_out() -> None:
    """Clean every log record of this process, whoever writes it and wherever it goes.

    Calling it again changes nothing.
    """
    before = logging.getLogRecordFactory()
    if isinstance(before, _CleanFactory):
        return
    logging.setLogRecordFactory(_CleanFactory(before))


class _CleanFactory:
    def __init__(self, make: _Factory) -> None:
        self._make = make

    def __call__(self, *args: Any, **options: Any) -> logging.LogRecord:
        record = self._make(*args, **options)
        clean_record(record)
        return record
