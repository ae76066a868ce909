"""Loading keeps the step busy: ranks read what they need while they compute, and wait little."""

import json
import random
from pathlib import Path

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.fixtures.small_model import make_small_model
from tests.multiprocess.input_tasks import rows_read, wait_share

pytestmark = pytest.mark.multiprocess

MOST = 0.05
"""Share of a step's seconds.  On two cores, which the reading thread shares with the arithmetic, it
is 0.004; without reading ahead, 0.01 for stored rows and 0.11 for rows that are encoded lazily."""

WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    order, rows = random.Random(0), []
    for _ in range(160):
        texts = [" ".join(order.choices(WORDS, k=order.randint(5, 40))) for _ in range(2)]
        roles = ("user", "assistant")
        turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        rows.append(json.dumps({"messages": turns}))
    file = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    file.write_text("\n".join(rows))
    return file


@pytest.mark.parametrize("kind", ["stored", "lazy"])
def test_training_waits_for_a_small_share_of_its_time(kind, base, chats, ranks):
    for share in ranks.run(wait_share, DeviceMesh(dp=2), base, chats, kind == "lazy"):
        assert share < MOST


@pytest.mark.parametrize("mesh", [DeviceMesh(dp=2), DeviceMesh(dp=2, tp=2)], ids=["dp2", "dp2-tp2"])
def test_a_rank_reads_its_own_rows_ahead_and_no_others(mesh, base, chats, ranks):
    reports = ranks.run(rows_read, mesh, base, chats)
    for ahead, read in reports:
        assert ahead == read
        assert any(read)
        assert not all(read)
    assert len({tuple(read) for _, read in reports}) == mesh.dp  # the dp ranks read different rows
