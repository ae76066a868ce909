"""The loader: what a batch is, in which order, and that training goes on at the next sample."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatrain.data.dataset import Dataset
from megatrain.data.lazy_row import Row
from megatrain.data.loader import DataLoader
from megatrain.data.meta import DatasetMeta
from megatrain.data.packed_dataset import PackingDataset
from megatrain.errors import ConfigError, DataError, StateError
from megatrain.parallel.layout import DeviceMesh
from megatrain.types import LazyRow
from tests.unit.data.byte_template import ByteTemplate

NUM_ROWS = 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Ten chats whose assistant says the row's number."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q" * (index + 1)},
                {"role": "assistant", "content": str(index)},
            ]
        }
        for index in range(NUM_ROWS)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def encoded(path: Path, *, streaming: bool = False, lazy: bool = False) -> Dataset:
    dataset = Dataset(DatasetMeta(path), streaming=streaming)
    return dataset.set_template(ByteTemplate()).encode(lazy=lazy)


def number(row: Mapping[str, Any]) -> int:
    return int(row["messages"][-1]["content"])


def numbers(batches: Any) -> list[list[int]]:
    return [[number(row) for row in batch] for batch in batches]


def endless(loader: DataLoader) -> Iterator[int]:
    """Yield the samples of one epoch after another."""
    while True:
        for batch in loader:
            yield from map(number, batch)


KINDS: dict[str, dict[str, Any]] = {
    "stored": {},
    "lazy": {"lazy": True},
    "streaming": {"streaming": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_a_batch_is_the_global_batch_in_order(path: Path, kind: str) -> None:
    loader = DataLoader(encoded(path, **KINDS[kind]), batch_size=4)
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    if kind != "streaming":
        assert len(loader) == 3


@kinds
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"min_batch_size": 2}, [4, 4, 2]),
        ({"min_batch_size": 3}, [4, 4]),
        ({"min_batch_size": 4}, [4, 4]),
        ({"drop_last": True}, [4, 4]),
    ],
)
def test_a_tail_smaller_than_the_least_is_left_out(
    path: Path, kind: str, options: dict[str, Any], sizes: list[int]
) -> None:
    loader = DataLoader(encoded(path, **KINDS[kind]), batch_size=4, **options)
    assert [len(batch) for batch in loader] == sizes
    assert [len(batch) for batch in loader] == sizes
    if kind != "streaming":
        assert len(loader) == len(sizes)


def test_rows_are_read_when_they_are_used(path: Path) -> None:
    loader = DataLoader(encoded(path), batch_size=10)
    batch = next(iter(loader))
    assert all(isinstance(row, LazyRow) for row in batch)
    assert [row.num_tokens for row in batch] == [index + 2 for index in range(10)]  # type: ignore[attr-defined]
    assert not any(row.is_read for row in batch)  # type: ignore[attr-defined]
    before = loader.wait_seconds
    assert batch[3]["input_ids"] == list(b"qqqq3")
    assert [row.is_read for row in batch].count(True) == 1  # type: ignore[attr-defined]
    assert loader.wait_seconds > before


@kinds
def test_rows_say_which_columns_are_numbers_without_being_read(tmp_path: Path, kind: str) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = [{**chat, "label": True}, {**chat, "weights": [0.5, 1.0], "name": "x"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = next(iter(DataLoader(encoded(file, **KINDS[kind]), 2)))
    assert [list(row.numbers) for row in batch] == [["label"], ["weights"]]  # type: ignore[attr-defined]
    assert not any(row.is_read for row in batch)  # type: ignore[attr-defined]


@kinds
def test_shuffling_depends_on_seed_and_epoch_alone(path: Path, kind: str) -> None:
    def epochs(seed: int) -> list[list[int]]:
        loader = DataLoader(encoded(path, **KINDS[kind]), 4, shuffle=True, seed=seed)
        return [[number(row) for batch in loader for row in batch] for _ in range(3)]

    first, second, third = epochs(1)
    assert epochs(1) == [first, second, third]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != third
    assert epochs(2) != [first, second, third]
    again = DataLoader(encoded(path, **KINDS[kind]), 3, shuffle=True, seed=1)
    again.set_epoch(2)
    assert [number(row) for batch in again for row in batch] == third


@kinds
@pytest.mark.parametrize("form", ["state", "number"])
@pytest.mark.parametrize("batch_size", [4, 3])
@pytest.mark.parametrize("consumed_batches", [1, 2, 3, 4, 8])
def test_training_goes_on_at_the_next_sample(
    path: Path, kind: str, form: str, batch_size: int, consumed_batches: int
) -> None:
    def make(batch_size: int) -> DataLoader:
        return DataLoader(encoded(path, **KINDS[kind]), batch_size, shuffle=True, seed=3)

    straight = list(islice(endless(make(4)), 60))
    loader = make(4)
    batches = (batch for _ in range(10) for batch in loader)
    handed = [number(row) for batch in islice(batches, consumed_batches) for row in batch]
    state = json.loads(json.dumps(loader.get_state()))
    assert state["consumed_train_samples"] == len(handed)
    assert handed == straight[: len(handed)]
    resumed = make(batch_size)
    resumed.resume_from_checkpoint(state if form == "state" else state["consumed_train_samples"])
    rest = list(islice(endless(resumed), 30))
    assert rest == straight[len(handed) : len(handed) + 30]
    assert resumed.get_state()["consumed_train_samples"] >= len(handed) + 30


@kinds
@pytest.mark.parametrize("consumed_batches", [1, 2, 3, 5])
def test_it_goes_on_where_tails_are_left_out(path: Path, kind: str, consumed_batches: int) -> None:
    def make() -> DataLoader:
        return DataLoader(encoded(path, **KINDS[kind]), 4, drop_last=True)

    straight = list(islice(endless(make()), 40))
    assert straight[:16] == [0, 1, 2, 3, 4, 5, 6, 7] * 2
    for form in ("state", "number"):
        loader = make()
        list(islice((batch for _ in range(5) for batch in loader), consumed_batches))
        state = loader.get_state()
        assert state["consumed_train_samples"] == 4 * consumed_batches
        resumed = make()
        resumed.resume_from_checkpoint(state if form == "state" else 4 * consumed_batches)
        assert list(islice(endless(resumed), 16)) == straight[4 * consumed_batches :][:16]


@pytest.mark.parametrize("kind", ["lazy", "streaming"])
def test_what_is_read_ahead_is_not_consumed(path: Path, kind: str) -> None:
    loader = DataLoader(encoded(path, **KINDS[kind]), batch_size=2, prefetch=4)
    batches = iter(loader)
    next(batches)
    time.sleep(0.2)
    assert loader.get_state()["consumed_train_samples"] == 2
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "megatrain-data"]


def test_a_set_epoch_of_now_keeps_the_place(path: Path) -> None:
    loader = DataLoader(encoded(path), 4)
    loader.resume_from_checkpoint(14)
    assert loader.epoch == 1
    loader.set_epoch(1)
    assert numbers(loader) == [[4, 5, 6, 7], [8, 9]]
    loader.resume_from_checkpoint(14)
    loader.set_epoch(2)
    assert numbers(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_loop_left_early_is_not_gone_on_with(path: Path) -> None:
    loader = DataLoader(encoded(path), 4)
    next(iter(loader))
    assert numbers(loader)[0] == [0, 1, 2, 3]
    assert loader.epoch == 1


def test_another_order_is_refused(path: Path) -> None:
    state = DataLoader(encoded(path), 4, shuffle=True, seed=1).get_state()
    with pytest.raises(ConfigError, match="made with seed=1, and this loader has 2"):
        DataLoader(encoded(path), 4, shuffle=True, seed=2).resume_from_checkpoint(state)
    with pytest.raises(ConfigError, match="not a state of a DataLoader"):
        DataLoader(encoded(path), 4).resume_from_checkpoint({"epoch": 1})


def test_other_data_and_places_that_are_not_there_are_refused(path: Path, tmp_path: Path) -> None:
    state = DataLoader(encoded(path), 4).get_state()
    assert state["num_samples"] == NUM_ROWS
    lines = path.read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(reversed(lines)))
    with pytest.raises(ConfigError, match="other data: fingerprint="):
        DataLoader(encoded(other), 4).resume_from_checkpoint(state)
    for kind in KINDS.values():
        own = DataLoader(encoded(path, **kind), 4).get_state()
        DataLoader(encoded(path, **kind), 4).resume_from_checkpoint(own)
    assert own["num_samples"] is None  # the last kind is a stream
    other.write_text("\n".join(lines[:8]))
    with pytest.raises(ConfigError, match="other data: num_samples=10, and this loader has 8"):
        DataLoader(encoded(other), 4).resume_from_checkpoint(state)
    for place, message in (
        ({"position": 11}, "position=11 is behind the end of an epoch of 10"),
        ({"position": -1}, "position must be a whole number, 0 or more"),
        ({"epoch": -1}, "epoch must be a whole number, 0 or more"),
        ({"consumed_train_samples": 1.5}, "consumed_train_samples must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataLoader(encoded(path), 4).resume_from_checkpoint({**state, **place})


@pytest.mark.parametrize("kind", ["lazy", "streaming"])
def test_an_error_names_its_row_and_comes_after_the_batches_before_it(
    tmp_path: Path, kind: str
) -> None:
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "1"}]}
    bad = {"messages": [{"role": "alien", "content": "q"}]}
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [good] * 6 + [bad] + [good]))
    batches = iter(DataLoader(encoded(file, **KINDS[kind]), batch_size=1, prefetch=3))
    # A stream maps its rows by the batch: the error then comes with the batch's first row.
    if kind == "lazy":
        assert len(list(islice(batches, 6))) == 6
    with pytest.raises(DataError, match=r"bad\.jsonl, line 7: unknown role 'alien'"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name == "megatrain-data"]


def test_a_dataset_may_be_made_by_a_function_or_be_a_list(path: Path) -> None:
    assert numbers(DataLoader(lambda: encoded(path), 8)) == [list(range(8)), [8, 9]]
    rows = [{"input_ids": [index]} for index in range(3)]
    assert list(DataLoader(rows, 2)) == [rows[:2], rows[2:]]


def test_packed_rows_are_batched(path: Path) -> None:
    dataset = PackingDataset(path).set_template(ByteTemplate(max_length=16)).encode()
    with pytest.raises(StateError, match="not packed yet"):
        DataLoader(dataset, 2)
    loader = DataLoader(dataset.pack_dataset(), 2)
    rows = [row for batch in loader for row in batch]
    assert sum(len(row["lengths"]) for row in rows) == NUM_ROWS
    assert len(rows) == len(dataset)


def test_sizes_that_cannot_work_are_refused(path: Path) -> None:
    dataset = encoded(path)
    for options, message in (
        ({"batch_size": 0}, "1 <= min_batch_size <= batch_size"),
        ({"batch_size": 4, "min_batch_size": 5}, "got 5 and 4"),
        ({"batch_size": 4, "min_batch_size": 2, "drop_last": True}, "drop_last=True means"),
        ({"batch_size": 16, "drop_last": True}, "10 samples make no batch of at least 16"),
        ({"batch_size": 4, "device_mesh": DeviceMesh(dp=8)}, "leaves some of 8 data-parallel"),
        ({"batch_size": 4, "prefetch": -1}, "prefetch must be a whole number, 0 or more"),
        ({"batch_size": 2.0}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": 4, "min_batch_size": "2"}, "min_batch_size must be a whole number"),
        ({"batch_size": 4, "seed": -1}, "seed must be a whole number, 0 or more"),
        ({"batch_size": 4, "seed": None}, "seed must be a whole number"),
        ({"batch_size": 4, "shuffle": "no"}, "shuffle must be True or False"),
        ({"batch_size": 4, "drop_last": 1}, "drop_last must be True or False"),
    ):
        with pytest.raises(ConfigError, match=message):
            DataLoader(dataset, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must be a Dataset or a sequence"):
        DataLoader(iter([{}]), 1)  # type: ignore[arg-type]
    assert len(DataLoader(dataset, 8, device_mesh=DeviceMesh(dp=8))) == 2


def test_batches_are_made_while_the_caller_works(path: Path) -> None:
    made: list[str] = []

    class Slow(ByteTemplate):
        """Takes at least 5 ms a row, and says in which thread."""

        def encode(self, row: Any, add_generation_prompt: bool = False) -> dict[str, Any] | None:
            time.sleep(0.005)
            made.append(threading.current_thread().name)
            return super().encode(row, add_generation_prompt)

    def lazy() -> Dataset:
        return Dataset(path).set_template(Slow()).encode(lazy=True)

    waiting = DataLoader(lazy(), batch_size=1, prefetch=0)
    assert len(list(waiting)) == NUM_ROWS
    assert waiting.wait_seconds >= NUM_ROWS * 0.005
    made.clear()
    ahead = iter(DataLoader(lazy(), batch_size=1, prefetch=2))
    next(ahead)
    deadline = time.monotonic() + 60
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) >= 3
    assert set(made) == {"megatrain-data"}
    ahead.close()  # type: ignore[attr-defined]


def until(condition: Callable[[], bool]) -> bool:
    """Wait for a thread, up to a minute."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def first_half(lengths: Sequence[int]) -> list[int]:
    """What a rank might read."""
    return list(range(len(lengths) // 2))


def test_stored_rows_that_this_rank_needs_are_read_ahead(path: Path) -> None:
    loader = DataLoader(encoded(path), batch_size=2, prefetch=1)
    batches = iter(loader)
    next(batches).read_ahead(first_half)
    for _ in range(2):  # made before it was known what is needed
        next(batches)
    batch = next(batches)
    assert until(lambda: batch[0].is_read)
    assert not batch[1].is_read
    waited = loader.wait_seconds
    assert batch[0]["length"] == len(batch[0]["input_ids"])
    assert loader.wait_seconds == waited  # nothing was read where the caller waits
    batches.close()


def test_a_row_that_cannot_be_read_ahead_is_an_error_where_it_is_used() -> None:
    def fail() -> dict[str, Any]:
        raise DataError("the file is gone")

    row = Row(fail, key="k", num_tokens=3, num_labels=2)
    row.read_ahead()
    assert not row.is_read
    with pytest.raises(DataError, match="gone"):
        row["input_ids"]


def test_lazy_rows_are_encoded_in_the_first_epoch_and_then_where_they_are_needed(
    path: Path,
) -> None:
    encoded_rows: list[str] = []

    class Spy(ByteTemplate):
        """Says what it encodes."""

        def encode(self, row: Any, add_generation_prompt: bool = False) -> dict[str, Any] | None:
            encoded_rows.append(row["messages"][-1]["content"])
            return super().encode(row, add_generation_prompt)

    loader = DataLoader(Dataset(path).set_template(Spy()).encode(lazy=True), 2, prefetch=1)
    first = [row for batch in loader for row in batch]
    assert sorted(encoded_rows) == [str(index) for index in range(NUM_ROWS)]
    encoded_rows.clear()
    for batch in loader:
        batch.read_ahead(first_half)
    again = [row for batch in loader for row in batch]
    assert {*encoded_rows} <= {"0", "2", "4", "6", "8"}
    assert len(encoded_rows) >= 5
    assert [row.key for row in again] == [row.key for row in first]  # type: ignore[attr-defined]
    assert [dict(row) for row in again] == [dict(row) for row in first]
