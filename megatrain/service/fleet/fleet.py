"""The ranks of one base model: commands in one order, from one thread.  No torch."""

import asyncio
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.bus.commands import Command, DeleteAdapter, OpenModel
from megatrain.bus.driver import Driver
from megatrain.bus.local_ranks import LocalRanks
from megatrain.checkpoint.locate import locate
from megatrain.config.bus import BusConfig
from megatrain.config.service import ServedModel
from megatrain.errors import BusError, ConfigError, RankError, StateError
from megatrain.parallel.layout import DeviceMesh
from megatrain.service.fleet.base_model import BaseModel
from megatrain.service.fleet.whole import BASE, Whole
from megatrain.service.observe.bus_watch import BusWatch, charged
from megatrain.service.observe.timing import Spent
from megatrain.service.store.records import Run

logger = logging.getLogger(__name__)

_Left = tuple["asyncio.Future[asyncio.Future[Any]]", Callable[[], Command], str]
"""What a command waits for, and how it is made; its tag."""

TRIES_EVERY_S = (1.0, 5.0, 15.0, 60.0)
"""Seconds between attempts to start ranks anew after their driver has given up."""


class Fleet:
    """One base model on its ranks."""

    def __init__(self, served: ServedModel, folder: Path) -> None:
        """`folder` is the service's, for the journal.  Raises ConfigError, CheckpointError."""
        self.served = served
        self.base = BaseModel.read(served, locate(served.path))
        self._journal = folder / "journal"
        self._config = _bus_config(served, self._journal)
        self._mesh = _mesh(served)
        self._submitter = ThreadPoolExecutor(1, thread_name_prefix=f"submit-{served.name}")
        self._driver: Driver | None = None
        self._adopted: dict[str, Future[Any]] = {}
        self._is_up = False
        self._numbers = itertools.count()
        self._left: dict[int, _Left] = {}
        """Commands that wait for ranks that start anew, by the order in which they were given."""
        self._confirmed: set[str] = set()
        """Tags that were confirmed while there was no driver to hear it."""
        self.is_closing = False
        self.whole = Whole(served, self.do)
        self.bus_watch = BusWatch()
        self.error = ""
        """Why it cannot work, if it cannot."""

    @property
    def name(self) -> str:
        """How clients call the model."""
        return self.served.name

    @property
    def is_ready(self) -> bool:
        """Whether commands are accepted."""
        return self._driver is not None and not self._driver.is_over

    @property
    def driver(self) -> Driver:
        """The driver.  Raises RankError while there is none."""
        if self._driver is None or self._driver.is_over:
            raise RankError(f"the ranks of {self.name} are not there: {self.error or 'starting'}")
        return self._driver

    @property
    def is_float32(self) -> bool:
        """Whether the trainer computes in float32."""
        return self.served.options.get("mixed_precision", "bf16") == "no"

    @property
    def num_pending(self) -> int:
        """Commands that the ranks have not answered."""
        return self._driver.num_pending if self._driver is not None else 0

    @property
    def health(self) -> dict[str, Any]:
        """The ranks' last signs of life."""
        return self._driver.health if self.is_ready and self._driver is not None else {}

    @property
    def losses(self) -> list[str]:
        """What was said of every loss of ranks."""
        return self._driver.losses if self._driver is not None else []

    async def start(self) -> None:
        """Start or reach the ranks, and open the model; go on from the journal, if there is one."""
        await asyncio.get_running_loop().run_in_executor(self._submitter, self._start)
        for tag in self._confirmed:
            self.confirm(tag)
        self._confirmed.clear()
        for number in sorted(self._left):
            turn, make, tag = self._left.pop(number)
            if not turn.done():
                turn.set_result(self._given(make, tag))
        self._is_up = True

    def _start(self) -> None:
        self._journal.mkdir(parents=True, exist_ok=True)
        if self.served.address is not None:
            driver = Driver.connect(self.served.address, self._config, mesh=self._mesh)
        else:
            ranks = LocalRanks(self._mesh or DeviceMesh(), self._config, **self._rank_settings())
            driver = Driver.launch(ranks, self._config)
        self.bus_watch.attach(driver.observers)
        self._adopted = dict(driver.adopted)
        try:
            driver.call(OpenModel(model_id=self.served.path, options=dict(self.served.options)))
        except StateError as error:
            driver.close()
            raise ConfigError(
                f"{self.name} was begun with other options than {dict(self.served.options)}, and "
                f"what was accepted with them is in {self._journal}",
                hint="serve it with the options it had, or in another --data",
            ) from error
        self._driver, self.error = driver, ""

    def _rank_settings(self) -> dict[str, Any]:
        return {"platform": self.served.platform}

    def adopted_tags(self) -> list[str]:
        """Return the tags of commands that an earlier driver had accepted."""
        return list(self._adopted)

    def submit(self, make: Callable[[], Command], tag: str = "") -> "asyncio.Future[Any]":
        """Have a command done after those that were submitted before; return what it will give.

        `make` builds it, in the thread that submits.  With a tag, its result comes again after a
        new start until `confirm`; a command of an earlier driver with the tag is not done twice.
        """
        first = self._given(make, tag) if self._is_up else None
        return asyncio.ensure_future(self._outcome(first, next(self._numbers), make, tag))

    def _given(self, make: Callable[[], Command], tag: str) -> "asyncio.Future[Any]":
        if tag and (before := self._adopted.pop(tag, None)) is not None:
            return asyncio.wrap_future(before)
        return self._accept(make, tag)

    def _accept(self, make: Callable[[], Command], tag: str) -> "asyncio.Future[Any]":
        loop, spent = asyncio.get_running_loop(), charged()
        accepted = loop.run_in_executor(self._submitter, self._submit, make, tag, spent)
        return asyncio.ensure_future(_both(accepted))

    def _submit(self, make: Callable[[], Command], tag: str, spent: Spent | None) -> "Future[Any]":
        with self.bus_watch.submitting(spent):
            return self.driver.submit(make(), hold=bool(tag))

    async def _outcome(
        self,
        first: "asyncio.Future[Any] | None",
        number: int,
        make: Callable[[], Command],
        tag: str,
    ) -> Any:
        """Return a command's value, from a new driver if this one gives up over the ranks.

        Without `first` it waits for ranks, as the command of this number.
        """
        waiting = first
        while True:
            driver = self._driver
            if waiting is not None:
                try:
                    return await waiting
                except BusError:
                    if self.is_closing or (driver is not None and not driver.is_over):
                        raise
                if self._driver is driver:  # nothing is to overtake it from now on
                    self._is_up = False
            if self._is_up:
                waiting = self._given(make, tag)
            else:
                turn = asyncio.get_running_loop().create_future()
                self._left[number] = turn, make, tag
                waiting = await turn

    async def do(self, command: Command, tag: str = "") -> Any:
        """Have a command done, and return its value.  Raises what the ranks raised."""
        return await self.submit(lambda: command, tag)

    async def let_go(self, run: Run, tag: str = "") -> None:
        """Take a run's adapter off the ranks, or open the base anew that it has trained."""
        if run.adapter == BASE:
            await self.whole.give_back(run.id)
        else:
            await self.do(DeleteAdapter(adapter=run.adapter, tag=tag), tag)

    async def inspect(self) -> dict[str, Any]:
        """Return what the ranks hold."""
        found: dict[str, Any] = await asyncio.to_thread(self.driver.inspect)
        return found

    def confirm(self, tag: str) -> None:
        """Say that the result of a tagged command is kept."""
        self._adopted.pop(tag, None)
        if self._driver is not None and not self._driver.is_over:
            self._driver.confirm(tag)
        else:
            self._confirmed.add(tag)

    async def watch(self) -> None:
        """Start the ranks anew whenever their driver has given up; runs until cancelled."""
        while True:
            await asyncio.sleep(0.5)
            if self.is_closing or self._driver is None or not self._driver.is_over:
                continue
            await self._start_anew()

    async def _start_anew(self) -> None:
        tries = 0
        while not self.is_closing:
            assert self._driver is not None
            self._is_up = False
            try:
                self.error = "the ranks were lost, and are started anew"
                await asyncio.to_thread(self._driver.close)
                await self.start()
            except Exception as error:  # noqa: BLE001 - whatever it is, later it may be gone
                self.error = f"the ranks cannot be started: {error}"
                logger.error("%s: %s", self.name, self.error)
                await asyncio.sleep(TRIES_EVERY_S[min(tries, len(TRIES_EVERY_S) - 1)])
                tries += 1
            else:
                return

    async def close(self) -> None:
        """End the ranks that were started here, or leave the others; the journal stays."""
        self.is_closing = True
        loop = asyncio.get_running_loop()
        if self._driver is not None:
            await loop.run_in_executor(None, self._driver.close)
        self._submitter.shutdown(wait=False)


async def _both(accepted: "asyncio.Future[Future[Any]]") -> Any:
    return await asyncio.wrap_future(await accepted)


def _mesh(served: ServedModel) -> DeviceMesh | None:
    """Return the layout of the ranks: what is left over is data parallel.  Raises LayoutError."""
    if served.address is not None:
        return None
    rest = served.tp * served.pp * served.cp
    if served.ranks % rest:
        raise ConfigError(
            f"{served.name}: {served.ranks} ranks cannot be split by tp·pp·cp = {rest}",
            hint=f"ranks must be a multiple of {rest}",
        )
    mesh = DeviceMesh(
        tp=served.tp, pp=served.pp, cp=served.cp, ep=served.ep, dp=served.ranks // rest
    )
    mesh.check_world(served.ranks)
    return mesh


def _bus_config(served: ServedModel, journal: Path) -> BusConfig:
    if "journal" in served.bus:
        raise ConfigError(f"{served.name}: the journal is the service's own: leave it out of bus")
    try:
        return BusConfig(**{**served.bus, "journal": journal})
    except ValidationError as error:
        raise ConfigError(f"{served.name}: bus does not take these options: {error}") from error


def is_shutdown(fleet: Fleet, error: BaseException) -> bool:
    """Tell whether a command was given up only because this process ends."""
    return fleet.is_closing and isinstance(error, BusError)
