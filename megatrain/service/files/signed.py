"""URLs of files that work without a key, for a while."""

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path

from megatrain.errors import DeniedError

LASTS_S = 3600.0


class Signer:
    """Signs what may be downloaded; the secret is this service's."""

    def __init__(self, folder: Path) -> None:
        path = folder / "url-secret"
        if not path.exists():
            fresh = path.with_suffix(f".{os.getpid()}")
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
            fresh.rename(path)
        self._secret = path.read_bytes()

    def sign(self, key: str, name: str) -> tuple[str, float]:
        """Return a ticket for one file, and when it ends."""
        ends = time.time() + LASTS_S
        body = json.dumps([key, name, ends]).encode()
        mac = hmac.new(self._secret, body, hashlib.sha256).digest()
        return base64.urlsafe_b64encode(mac + body).decode().rstrip("="), ends

    def check(self, ticket: str) -> tuple[str, str]:
        """Return key and name of the file that a ticket is for.  Raises DeniedError."""
        try:
            raw = base64.urlsafe_b64decode(ticket + "=" * (-len(ticket) % 4))
            mac, body = raw[:32], raw[32:]
            expected = hmac.new(self._secret, body, hashlib.sha256).digest()
            if not hmac.compare_digest(mac, expected):
                raise ValueError("another secret")
            key, name, ends = json.loads(body)
        except ValueError as error:
            raise DeniedError("this URL is not one that this service has signed") from error
        if ends < time.time():
            raise DeniedError("this URL has expired: ask for a new one")
        return str(key), str(name)
