"""The ranks of one base model: commands in one order, from one thread.  No torch."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatrain.bus.commands import Command, OpenModel
from megatrain.bus.driver import Driver
from megatrain.bus.local_ranks import LocalRanks
from megatrain.checkpoint.locate import locate
from megatrain.config.bus import BusConfig
from megatrain.config.service import ServedModel
from megatrain.errors import BusError, ConfigError, RankError
from megatrain.parallel.layout import DeviceMesh
from megatrain.service.fleet.base_model import BaseModel

logger = logging.getLogger(__name__)

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
        self._is_up = asyncio.Event()
        self.is_closing = False
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
        self._is_up.set()

    def _start(self) -> None:
        self._journal.mkdir(parents=True, exist_ok=True)
        if self.served.address is not None:
            driver = Driver.connect(self.served.address, self._config, mesh=self._mesh)
        else:
            ranks = LocalRanks(self._mesh or DeviceMesh(), self._config, **self._rank_settings())
            driver = Driver.launch(ranks, self._config)
        self._adopted = dict(driver.adopted)
        driver.call(OpenModel(model_id=self.served.path, options=dict(self.served.options)))
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
        if tag and (before := self._adopted.pop(tag, None)) is not None:
            first: asyncio.Future[Any] = asyncio.wrap_future(before)
        else:
            first = self._accept(make, tag)
        return asyncio.ensure_future(self._outcome(first, make, tag))

    def _accept(self, make: Callable[[], Command], tag: str) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        accepted = loop.run_in_executor(self._submitter, self._submit, make, tag)
        return asyncio.ensure_future(_both(accepted))

    def _submit(self, make: Callable[[], Command], tag: str) -> "Future[Any]":
        return self.driver.submit(make(), hold=bool(tag))

    async def _outcome(
        self, first: "asyncio.Future[Any]", make: Callable[[], Command], tag: str
    ) -> Any:
        """Return a command's value, from a new driver if this one gives up over the ranks."""
        waiting = first
        while True:
            driver = self._driver
            try:
                return await waiting
            except BusError:
                if self.is_closing or (driver is not None and not driver.is_over):
                    raise
            await self._is_up.wait()
            if tag and (before := self._adopted.pop(tag, None)) is not None:
                waiting = asyncio.wrap_future(before)
            else:
                waiting = self._accept(make, tag)

    async def do(self, command: Command, tag: str = "") -> Any:
        """Have a command done, and return its value.  Raises what the ranks raised."""
        return await self.submit(lambda: command, tag)

    async def inspect(self) -> dict[str, Any]:
        """Return what the ranks hold."""
        found: dict[str, Any] = await asyncio.to_thread(self.driver.inspect)
        return found

    def confirm(self, tag: str) -> None:
        """Say that the result of a tagged command is kept."""
        if self._driver is not None and not self._driver.is_over:
            self._driver.confirm(tag)

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
            self._is_up.clear()
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
