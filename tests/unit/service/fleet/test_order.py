"""Commands keep their order when a driver gives up and ranks start anew; confirmations count."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megatrain.bus.commands import Command, DeleteAdapter
from megatrain.config.service import ServedModel
from megatrain.errors import RankError
from megatrain.service.fleet import fleet as fleet_module
from megatrain.service.fleet.fleet import Fleet


class Driver:
    """What the bus's driver does, as far as a fleet can tell."""

    def __init__(self, held: dict[str, "Future[Any]"]) -> None:
        self.adopted = held
        self.is_over = False
        self.commands: list[str] = []
        self.confirmed: list[str] = []
        self._open: list[Future[Any]] = []

    def submit(self, command: Command, *, hold: bool) -> "Future[Any]":
        future: Future[Any] = Future()
        self.commands.append(command.tag)
        self._open.append(future)
        return future

    def finish(self) -> None:
        for future in self._open:
            future.set_result(self)

    def give_up(self) -> None:
        self.is_over = True
        for future in self._open:
            future.set_exception(RankError("the ranks are lost for good"))

    def confirm(self, tag: str) -> None:
        self.confirmed.append(tag)

    def close(self) -> None:
        pass


@pytest.fixture
def drivers() -> list[Driver]:
    return []


@pytest.fixture
def fleet(tmp_path: Path, drivers: list[Driver], monkeypatch: pytest.MonkeyPatch) -> Fleet:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))

    def start(self: Fleet) -> None:
        held: dict[str, Future[Any]] = {"adopted": Future()} if drivers else {}
        drivers.append(Driver(held))
        self._driver, self._adopted = drivers[-1], dict(held)  # type: ignore[assignment]

    monkeypatch.setattr(Fleet, "_start", start)
    monkeypatch.setattr(fleet_module, "TRIES_EVERY_S", (0.01,))
    return Fleet(ServedModel(name="base", path=str(tmp_path)), tmp_path / "fleet")


def step(tag: str) -> Callable[[], Command]:
    return lambda: DeleteAdapter(adapter="a", tag=tag)


def test_commands_are_given_to_new_ranks_in_the_order_of_their_first_submission(
    fleet: Fleet, drivers: list[Driver]
) -> None:
    async def check() -> None:
        await fleet.start()
        watching = asyncio.ensure_future(fleet.watch())
        tags = [f"before-{number}" for number in range(20)]
        waiting = [fleet.submit(step(tag), "") for tag in tags[:10]]
        await asyncio.sleep(0.1)
        drivers[0].give_up()
        await asyncio.sleep(0)
        waiting += [fleet.submit(step(tag), "") for tag in tags[10:]]
        while len(drivers) < 2 or len(drivers[1].commands) < len(tags):
            await asyncio.sleep(0.01)
        waiting.append(fleet.submit(step("after"), ""))
        await asyncio.sleep(0.1)
        assert drivers[1].commands == [*tags, "after"]
        drivers[1].finish()
        assert await asyncio.gather(*waiting) == [drivers[1]] * 21
        watching.cancel()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_what_was_confirmed_while_there_were_no_ranks_is_confirmed_to_the_next(
    fleet: Fleet, drivers: list[Driver]
) -> None:
    async def check() -> None:
        await fleet.start()
        drivers[0].give_up()
        fleet.confirm("adopted")
        watching = asyncio.ensure_future(fleet.watch())
        while len(drivers) < 2 or not drivers[1].confirmed:
            await asyncio.sleep(0.01)
        assert drivers[1].confirmed == ["adopted"]
        assert fleet.adopted_tags() == []
        watching.cancel()

    asyncio.run(asyncio.wait_for(check(), 30))
