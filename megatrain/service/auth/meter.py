"""Counts tokens by day, project and key, and says when a project's day is used up.

Counts are in memory, and in the database within FLUSH_S: a request does not wait for them.
"""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace

from megatrain.errors import BusyError, MegatrainError
from megatrain.service.auth.principal import Principal
from megatrain.service.store import usage
from megatrain.service.store.records import Used
from megatrain.service.store.store import Store

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
DAY_S = 86400.0
HOUR_S = 3600

_Who = tuple[str, str, int]
"""Day, project, key."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request was counted as when it came: the most that it may use."""

    who: _Who
    tokens: int


def charge_of(when: float, project: str, key_id: int, tokens: int) -> Charge:
    """Return what a request was counted as that came at a time."""
    return Charge((time.strftime("%Y-%m-%d", time.gmtime(when)), project, key_id), tokens)


class Meter:
    """What projects use."""

    def __init__(self, store: Store, tokens_per_day: int | None) -> None:
        self._store, self._limit = store, tokens_per_day
        self._spent: dict[tuple[str, str], int] = {}
        """Tokens by day and project, all of them, as far as there is a limit."""
        self._tokens: Counter[_Who] = Counter()
        self._requests: Counter[_Who] = Counter()
        self._used: Counter[Used] = Counter()
        """What is not yet written; of what was used without its tokens."""
        self._flushing: asyncio.Task[None] | None = None

    async def spend(self, who: Principal, tokens: int) -> Charge:
        """Count a request.  Raises BusyError where a project's tokens of the day are used up."""
        charge = charge_of(time.time(), who.project, who.key_id, tokens)
        if tokens and self._limit is not None:
            await self._check(who.project, charge.who[0], tokens, self._limit)
        self._tokens[charge.who] += tokens
        self._requests[charge.who] += 1
        self._flush_soon()
        return charge

    def settle(self, charge: Charge, used: int) -> None:
        """Give back what a request was counted as and has not used."""
        day, project, _ = charge.who
        if not (left := charge.tokens - used):
            return
        if (project, day) in self._spent:
            self._spent[project, day] -= left
        self._tokens[charge.who] -= left
        self._flush_soon()

    async def _check(self, project: str, day: str, tokens: int, limit: int) -> None:
        if (project, day) not in self._spent:
            used = await self._store.read(usage.tokens_of(project, day))
            self._spent = {key: value for key, value in self._spent.items() if key[1] == day}
            self._spent.setdefault((project, day), used)
        used = self._spent[project, day]
        if used + tokens > limit:
            raise BusyError(
                f"this project has used {used} of {limit} tokens today, and asks for {tokens}",
                hint="it begins anew at midnight, UTC",
                retry_after_s=DAY_S - time.time() % DAY_S,
            )
        self._spent[project, day] = used + tokens

    def use(self, used: Used) -> None:
        """Count what was used by hour and kind, which no limit is about."""
        self._used[replace(used, tokens=0)] += used.tokens
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.ensure_future(self._flush_later())

    async def _flush_later(self) -> None:
        await asyncio.sleep(FLUSH_S)
        self._flushing = None
        try:
            await self.flush()
        except MegatrainError as error:
            logger.warning("what was used is not yet written down: %s", error.message)

    async def flush(self) -> None:
        """Write down what was counted.  Raises StateError; the counts are kept then."""
        tokens, requests, used = self._tokens, self._requests, self._used
        if not tokens and not used:
            return
        self._tokens, self._requests, self._used = Counter(), Counter(), Counter()
        changes = [
            usage.count(*who, "tokens", tokens[who], num_requests=requests[who]) for who in tokens
        ]
        changes += [usage.use(replace(each, tokens=count)) for each, count in used.items()]
        try:
            await self._store.write(*changes)
        except MegatrainError:
            self._tokens.update(tokens)
            self._requests.update(requests)
            self._used.update(used)
            raise
