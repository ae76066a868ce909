"""From a request's headers to who asks."""

import hmac
import time
from collections.abc import Mapping

from megatrain.config.service import ServiceConfig
from megatrain.errors import DeniedError
from megatrain.service.auth.bucket import Buckets
from megatrain.service.auth.failures import Failures
from megatrain.service.auth.key import PREFIX, digest, new_key
from megatrain.service.auth.meter import HOUR_S, Charge, Meter
from megatrain.service.auth.principal import SCOPES, Principal
from megatrain.service.store import keys, usage
from megatrain.service.store.records import ApiKey, AuditEntry, Project, Used
from megatrain.service.store.store import Store

FIRST_PROJECT = "default"
LOCAL = Principal("local", 0, frozenset(SCOPES), "local")
"""Whoever asks a service without keys."""
KNOWN_FOR_S = 0.9
"""A key is looked up again so soon: one that is revoked works no longer than that."""
USED_EVERY_S = 60.0
MAX_KNOWN = 10000
"""Keys, unknown ones too, whose records are kept in memory."""


class Authenticator:
    """Knows keys, and how often they ask."""

    def __init__(self, store: Store, config: ServiceConfig) -> None:
        self._store, self._config = store, config
        self._known: dict[str, tuple[float, ApiKey | None]] = {}
        self._used: dict[int, float] = {}
        self._buckets = Buckets(config.limits.requests_per_s)
        self._failures = Failures()
        self._meter = Meter(store, config.limits.tokens_per_day)

    async def first_key(self) -> str | None:
        """Make the first key, and return it; None if there is one, or none is asked for."""
        if not self._config.keys:
            return None
        if len(await self._store.read(keys.all_keys())):
            return None
        key, record = new_key(FIRST_PROJECT, "first", SCOPES)
        project = Project(id=FIRST_PROJECT, name=FIRST_PROJECT, created=time.time())
        await self._store.write(keys.add_project(project), keys.add(record))
        return key

    async def authenticate(
        self, headers: Mapping[str, str], scope: str, address: str = ""
    ) -> Principal:
        """Return who asks, from an address.

        Raises DeniedError for a key that is missing, unknown, over or not for this; BusyError for
        one that asks too often, and for an address that shows unknown ones too often.
        """
        if not self._config.keys:
            return LOCAL
        key = key_of(headers)
        if not key.startswith(PREFIX):
            raise DeniedError(
                "an API key is needed: X-API-Key, or Authorization: Bearer",
                hint="megatrain keys create makes one",
            )
        record = await self._lookup(key, address)
        now = time.time()
        if record is None or record.revoked is not None:
            raise DeniedError("this API key is not known, or was revoked")
        if record.expires is not None and record.expires < now:
            raise DeniedError("this API key has expired")
        who = Principal(record.project, record.id, frozenset(record.scopes), record.name)
        if not who.may(scope):
            raise DeniedError(f"this API key has not the scope {scope!r}")
        self._buckets.take(record.id)
        await self._note_use(record, now)
        return who

    async def _lookup(self, key: str, address: str) -> ApiKey | None:
        wanted, now = digest(key), time.monotonic()
        when, record = self._known.get(wanted, (-1e9, None))
        if now - when > KNOWN_FOR_S:
            if record is None:
                self._failures.check(address)
            record = await self._store.read(keys.by_hash(wanted))
            if record is None:
                self._failures.note(address)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[wanted] = now, record
        if record is None or not hmac.compare_digest(record.hash, wanted):
            return None
        return record

    async def _note_use(self, record: ApiKey, now: float) -> None:
        if now - self._used.get(record.id, 0.0) > USED_EVERY_S:
            self._used[record.id] = now
            await self._store.write(keys.used(record.id, now))

    async def spend(self, who: Principal, tokens: int) -> Charge:
        """Count tokens against a project's day.  Raises BusyError where they are used up."""
        return await self._meter.spend(who, tokens)

    def settle(self, charge: Charge, used: int) -> None:
        """Give back what was counted and is not used."""
        self._meter.settle(charge, used)

    def use(self, project: str, session: str, base_model: str, tokens: Mapping[str, int]) -> None:
        """Count tokens that were used in this hour, by kind."""
        hour = int(time.time()) // HOUR_S * HOUR_S
        for kind, count in tokens.items():
            if count:
                self._meter.use(
                    Used(
                        hour=hour,
                        project=project,
                        session=session,
                        base_model=base_model,
                        kind=kind,
                        tokens=count,
                    )
                )

    async def flush(self) -> None:
        """Write down what was counted.  Raises StateError; the counts are kept then."""
        await self._meter.flush()

    async def audit(self, who: Principal, action: str, what: str, address: str = "") -> None:
        """Write down what a key has done."""
        entry = AuditEntry(
            time=time.time(),
            project=who.project,
            key_id=who.key_id,
            action=action,
            object=what,
            address=address,
        )
        await self._store.write(usage.audit(entry))


def key_of(headers: Mapping[str, str]) -> str:
    """Return the key that a request shows, or an empty text."""
    if key := headers.get("x-api-key", ""):
        return key.strip()
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
