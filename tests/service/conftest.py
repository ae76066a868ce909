"""What a test opens ends with it."""

from collections.abc import Iterator

import pytest

from tests.service.sdk_clients import close_clients, holders


@pytest.fixture(autouse=True)
def clients_end() -> Iterator[None]:
    """Close the SDK's clients of a test; those of its module's fixtures stay."""
    before = holders()
    yield
    close_clients(but=before)
