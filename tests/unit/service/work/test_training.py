"""Passes of several tenants: what becomes of one of them is nobody else's."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatrain.bus.commands import Command, ForwardBackwardMany
from megatrain.config.service import Limits
from megatrain.service.auth.authenticate import Authenticator
from megatrain.service.store.store import Store
from megatrain.service.wire.passes import decode_pass
from megatrain.service.work.futures import Futures
from megatrain.service.work.ledger import Ledger
from megatrain.service.work.run_state import RunState
from megatrain.service.work.ticket import Result, Ticket
from megatrain.service.work.training import Training
from megatrain.types import StepOutput
from tests.service.owned import protobuf
from tests.unit.service.auth.conftest import config
from tests.unit.service.work.test_scheduler import run, ticket

OUTPUT = StepOutput(1.0, [np.zeros(4, np.float32)], num_tokens=3, divisor=3.0)
OVER = Result(b'{"error":"the session is over","category":"user"}', failed=True)


class Ranks:
    """Ranks that do passes, and let something else happen meanwhile."""

    name = "base"
    is_closing = False

    def __init__(self, meanwhile: Callable[[int], object]) -> None:
        self.meanwhile = meanwhile
        self.passes: list[list[str]] = []
        self.confirmed: list[str] = []
        self.answers: dict[str, object] = {}

    async def submit(self, make: Callable[[], Command], tag: str) -> dict[str, object]:
        await self.meanwhile(0)  # before it is built: it is built anew after a loss of ranks, too
        command = make()
        assert isinstance(command, ForwardBackwardMany)
        self.passes.append([batch.adapter for batch in command.batches])
        await self.meanwhile(1)
        return {name: self.answers.get(name, OUTPUT) for name in self.passes[-1]}

    def confirm(self, tag: str) -> None:
        self.confirmed.append(tag)


def shared_pass(
    folder: Path, *, over_at: int | None = None, first: object = OUTPUT
) -> tuple[Ranks, list[Ticket], list[RunState]]:
    """Do a pass of two runs, the first of which may end meanwhile, or be answered otherwise."""
    runs = [run("one"), run("two")]
    tickets = [ticket(each, 1, decode_pass(protobuf(each.id, 1), Limits())) for each in runs]

    async def whole() -> Ranks:
        store = await Store.open(f"sqlite:///{folder / 'service.db'}")
        futures = Futures(store, Limits(), Ledger(Authenticator(store, config())))

        async def meanwhile(stage: int) -> None:
            if stage == over_at:
                await futures.finish(tickets[0], OVER)

        ranks = Ranks(meanwhile)
        ranks.answers[runs[0].adapter] = first
        for each in tickets:
            await futures.accept(each)
        if over_at == -1:
            await futures.finish(tickets[0], OVER)
        members = list(zip(runs, tickets, strict=True))
        await Training(ranks, futures, {}).start(members)  # type: ignore[arg-type]
        await store.close()
        return ranks

    return asyncio.run(whole()), tickets, runs


@pytest.mark.parametrize("over_at", [0, 1])
def test_a_session_that_ends_during_a_shared_pass_takes_nothing_from_others(tmp_path, over_at):
    ranks, (one, two), runs = shared_pass(tmp_path, over_at=over_at)
    assert one.result == OVER
    assert two.result is not None
    assert (two.result.failed, two.result.kind) == (False, "proto")
    assert ranks.passes == [[each.adapter for each in runs]]
    assert ranks.confirmed == [f"{one.id},{two.id}"]


def test_what_has_a_result_before_its_turn_is_not_done(tmp_path):
    ranks, (one, two), (_, second) = shared_pass(tmp_path, over_at=-1)
    assert one.result == OVER
    assert not two.result.failed
    assert ranks.passes == [[second.adapter]]


@pytest.mark.parametrize("first", [StepOutput(np.nan, []), StepOutput(1.0, []), "no output"])
def test_an_answer_that_cannot_be_told_fails_its_own_request_alone(tmp_path, first):
    _, (one, two), _ = shared_pass(tmp_path, first=first)
    assert one.result.failed
    assert not two.result.failed
