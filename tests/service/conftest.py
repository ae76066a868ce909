"""What a test opens ends with it."""

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from tests.service.sdk_clients import close_clients, holders
from tests.service.server import Server

LOG_CHARS = 20_000
"""Of a server's log that are shown with a failure: the last."""


@pytest.fixture(autouse=True)
def clients_end() -> Iterator[None]:
    """Close the SDK's clients of a test; those of its module's fixtures stay."""
    before = holders()
    yield
    close_clients(but=before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what a failed test's servers have printed."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"log of {name}", value.log[-LOG_CHARS:]))
    return report
