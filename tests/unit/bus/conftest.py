"""Ranks that only pretend, for drivers that are real."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.bus_server import FakeRanks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr("megatrain.bus.supervisor.POLL_S", 0.01)
    monkeypatch.setattr("megatrain.bus.trouble.SETTLE_S", 0.02)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[FakeRanks]:
    ranks = FakeRanks(tmp_path)
    yield ranks
    ranks.close()
