"""Several calls at once, of which none goes on when one has failed."""

import asyncio
from collections.abc import Awaitable, Iterable


async def together[T](calls: Iterable[Awaitable[T]]) -> list[T]:
    """Return all results in order; raise the first error, after the other calls have ended."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
