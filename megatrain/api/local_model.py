"""A model of mode 'local': every rank runs the user's script, and commands are done here."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatrain.bus.commands import CloseModel, Command, OpenModel
from megatrain.bus.model_host import ModelHost
from megatrain.parallel.joined import Session


class LocalModel:
    """Runs a model's commands in this process, as the other ranks do in theirs."""

    def __init__(self, command: OpenModel, session: Session) -> None:
        self.host: ModelHost | None = ModelHost(command, session)

    @property
    def key(self) -> str:
        """What commands call the model."""
        return "model"

    @property
    def trained(self) -> list[str]:
        """Names of what is trained."""
        return [] if self.host is None else self.host.trained

    def call(self, command: Command) -> Any:
        """Do a command and return its result."""
        if isinstance(command, CloseModel):
            self.host = None
            return None
        assert self.host is not None
        self.host.check(command)
        return self.host.run(command)  # type: ignore[arg-type]

    def submit(
        self,
        command: Command,
        timeout_s: float | None,
        finish: Callable[[Any], Any] = lambda value: value,
    ) -> "Future[Any]":
        """Do a command at once; `timeout_s` is for ranks that are other processes."""
        done: Future[Any] = Future()
        try:
            done.set_result(finish(self.call(command)))
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            done.set_exception(error)
        return done
