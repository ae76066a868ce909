"""Keeps keys out of logs."""

import logging
import re

_SECRET = re.compile(r"tml-[A-Za-z0-9_\-]{6,}|[Bb]earer\s+\S+|eyJ[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-.]+")


class Redact(logging.Filter):
    """Replaces API keys, bearer tokens and JWTs in log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; let it pass."""
        text = record.getMessage()
        clean = _SECRET.sub("[secret]", text)
        if clean != text:
            record.msg, record.args = clean, None
        return True
