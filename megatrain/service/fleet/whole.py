"""A run that trains every parameter of a base model, alone on its ranks.  No torch."""

from collections.abc import Awaitable, Callable
from typing import Any

from megatrain.bus.commands import CloseModel, Command, OpenModel, SetOptimizer
from megatrain.config.service import ServedModel
from megatrain.errors import ConfigError, StateError

BASE = ""
"""How commands name what is no adapter: the base itself."""


class Whole:
    """Who trains all parameters of one base model."""

    def __init__(self, served: ServedModel, do: Callable[..., Awaitable[Any]]) -> None:
        """`do(command, tag)` has the ranks do a command."""
        self._served, self._do = served, do
        self.owner = ""
        """Id of the run that does, if any."""
        self._is_left = False
        """Whether it is still as a run that is over has trained it."""
        self._is_open = True

    def check(self, *, is_lora: bool) -> None:
        """Raise ConfigError for a run of the kind that this model is not served for."""
        if is_lora == self._served.full_parameters:
            raise ConfigError(
                f"{self._served.name} is served for runs that train all parameters: create a model "
                "without a lora_config"
                if is_lora
                else f"{self._served.name} is served for adapters: create a model with a "
                "lora_config (the operator decides, by full_parameters)"
            )

    def take(self, run_id: str) -> None:
        """Have the model for a run.  Raises StateError while another one has it."""
        if self.owner not in ("", run_id):
            raise StateError(
                f"all parameters of {self._served.name} are being trained by another run, and it "
                "is for one at a time",
                hint="try again when that run is over",
            )
        self.owner = run_id

    async def begin(self, run_id: str, optimizer: tuple[str, dict[str, Any]], tag: str) -> None:
        """Take the model, and let its parameters be trained."""
        kind, options = optimizer
        await self.make(run_id, SetOptimizer(kind=kind, options=options, tag=tag), tag)

    async def make(self, run_id: str, command: Command, tag: str) -> Any:
        """Do what makes a run's parameters; a run that has failed to begin has nothing."""
        self.take(run_id)
        try:
            if self._is_left:  # it could not be opened anew before
                await self._open_anew()
            return await self._do(command, tag)
        except BaseException:
            self.owner = ""
            raise

    async def give_back(self, run_id: str) -> None:
        """Open the checkpoint anew, so that nobody meets what a run has trained."""
        if self.owner != run_id:
            return
        self._is_left = self._is_open = True
        try:
            await self._open_anew()
        finally:
            self.owner = ""

    async def _open_anew(self) -> None:
        if self._is_open:
            await self._do(CloseModel())
            self._is_open = False
        await self._do(OpenModel(model_id=self._served.path, options=dict(self._served.options)))
        self._is_left = False
