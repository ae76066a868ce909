"""A run goes on on the data, and in the order, that it stopped on; or it says what is another."""

import logging

import pytest

from megatrain.cli.train.position import go_to_position, write_position
from megatrain.data.loader import DataLoader
from megatrain.errors import ConfigError
from tests.fixtures.run_config import configure

ROWS = [{"input_ids": [number]} for number in range(10)]
DATA = configure().data


def loader(rows=ROWS, **options):
    return DataLoader(rows, 2, **{"shuffle": True, "seed": 1} | options)


@pytest.fixture
def path(tmp_path):
    """A file of a run that was saved after 4 rows, and after 6."""
    running, path = loader(), tmp_path / "data.jsonl"
    batches = iter(running)
    next(batches)
    for step in (2, 3):
        next(batches)
        write_position(path, step=step, loader=running.get_state(), data=DATA)
    return path


def test_the_loader_goes_on_after_the_checkpoints_rows(path):
    resumed = loader()
    go_to_position(resumed, path, step=2, consumed=4, data=DATA)
    assert list(resumed) == list(loader())[2:]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"seed": 2}, "seed=1, and this loader has 2"),
        (ROWS, {"shuffle": False}, "shuffle=True, and this loader has False"),
        (ROWS[:8], {}, "num_samples=10, and this loader has 8"),
    ],
)
def test_another_order_and_other_data_are_refused_with_a_way_out(path, rows, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        go_to_position(loader(rows, **options), path, step=2, consumed=4, data=DATA)
    assert "train.other_data = true" in caught.value.hint


def test_a_stream_of_other_files_is_refused(path):
    stream = configure("data.streaming=true", "train.max_steps=3").data
    go_to_position(loader(), path, step=2, consumed=4, data=stream)
    other = configure(
        "data.streaming=true", "train.max_steps=3", "data.train.0.dataset_id=other.jsonl"
    ).data
    with pytest.raises(ConfigError, match=r"other data: .*rows\.jsonl.*other\.jsonl"):
        go_to_position(loader(), path, step=2, consumed=4, data=other)


@pytest.mark.parametrize(("step", "consumed"), [(9, 18), (2, 5)])
def test_without_a_line_of_the_checkpoint_the_number_decides(path, step, consumed, caplog):
    resumed = loader()
    with caplog.at_level(logging.WARNING):
        go_to_position(resumed, path, step=step, consumed=consumed, data=DATA)
    assert resumed.get_state()["consumed_train_samples"] == consumed
    assert "are not compared" in caplog.text
