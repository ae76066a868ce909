"""Packing: nothing is lost, rows are full, borders are kept, and it is quick."""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from megatrain.data.meta import DatasetMeta
from megatrain.data.packed_dataset import PackingDataset
from megatrain.data.packing import best_fit_decreasing
from megatrain.errors import ConfigError, DataError, StateError
from tests.unit.data.byte_template import ByteTemplate

MAX_LENGTH = 4096


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lognormal(num: int, *, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Lengths as conversations have them: median 403, mean 665 tokens, at most MAX_LENGTH."""
    drawn = np.random.default_rng(seed).lognormal(mean=6.0, sigma=1.0, size=num)
    return np.clip(drawn, 1, MAX_LENGTH).astype(np.int64)


def plain_best_fit(lengths: list[int], max_length: int) -> int:
    """Best-fit-decreasing as a textbook has it, sample by sample; returns the number of rows."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(left, index) for index, left in enumerate(space) if left >= length]
        if fitting:
            space[min(fitting)[1]] -= length
        else:
            space.append(max_length - length)
    return len(space)


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_sample_once_and_never_too_much(seed: int) -> None:
    lengths = lognormal(2000, seed=seed)
    rows = best_fit_decreasing(lengths, MAX_LENGTH)
    assert sorted(np.concatenate(rows).tolist()) == list(range(2000))
    assert all(lengths[row].sum() <= MAX_LENGTH for row in rows)
    assert all((np.diff(row) > 0).all() for row in rows)
    firsts = [row[0] for row in rows]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("max_length", [7, 30, 100, 1000])
def test_it_is_best_fit_decreasing(max_length: int) -> None:
    lengths = np.random.default_rng(max_length).integers(1, max_length + 1, size=700)
    rows = best_fit_decreasing(lengths, max_length)
    assert len(rows) == plain_best_fit(lengths.tolist(), max_length)


@pytest.mark.parametrize("max_length", [4096, 8192])
def test_lognormal_lengths_fill_rows_to_98_percent(max_length: int) -> None:
    lengths = lognormal(20_000)
    rows = best_fit_decreasing(lengths, max_length)
    assert lengths.sum() / (len(rows) * max_length) >= 0.98


def test_a_million_samples_take_seconds() -> None:
    lengths = lognormal(1_000_000)
    start = time.process_time()
    rows = best_fit_decreasing(lengths, MAX_LENGTH)
    # 2 s of one idle core; tenfold for a busy machine.  Sample by sample it would be an hour.
    assert time.process_time() - start < 20
    assert lengths.sum() / (len(rows) * MAX_LENGTH) >= 0.98


def test_a_sample_that_fits_nowhere_is_named() -> None:
    with pytest.raises(DataError, match="sample 1 has 5 tokens, and a packed row holds 1 to 4"):
        best_fit_decreasing([4, 5], 4)
    assert best_fit_decreasing([], 4) == []


def packed(tmp_path: Path, max_length: int = 24) -> PackingDataset:
    path = tmp_path / "chats.jsonl"
    rows = [
        [
            {"role": "user", "content": chr(97 + index) * 3},
            {"role": "assistant", "content": "A" * (index + 1)},
        ]
        for index in range(12)
    ]
    # The first token of a sample that begins with the assistant is a label, until it is packed.
    rows.append([{"role": "assistant", "content": "xyz"}])
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    dataset = PackingDataset(DatasetMeta(path))
    dataset.set_template(ByteTemplate(max_length))
    return dataset.encode().pack_dataset()


def test_a_packed_row_keeps_the_borders_of_its_samples(tmp_path: Path) -> None:
    dataset = packed(tmp_path)
    samples = PackingDataset(DatasetMeta(tmp_path / "chats.jsonl"))
    samples.set_template(ByteTemplate(24)).encode()
    whole = [samples._encoded.row(index) for index in range(13)]  # type: ignore[union-attr]
    seen = []
    for row in dataset:
        assert row.keys() == {
            "input_ids", "labels", "position_ids", "lengths", "length", "num_labels"
        }  # fmt: skip
        assert row["length"] == len(row["input_ids"]) == sum(row["lengths"]) <= 24
        assert row["num_labels"] == sum(label != -100 for label in row["labels"])
        start = 0
        for length in row["lengths"]:
            end = start + length
            assert row["position_ids"][start:end] == list(range(length))
            assert row["labels"][start] == -100
            ids = row["input_ids"][start:end]
            source = next(sample for sample in whole if sample["input_ids"] == ids)
            assert row["labels"][start + 1 : end] == source["labels"][1:]
            seen.append(source.key)
            start = end
    assert sorted(seen) == sorted(sample.key for sample in whole)


def test_sizes_are_known_before_a_row_is_put_together(tmp_path: Path) -> None:
    dataset, again = packed(tmp_path), packed(tmp_path)
    for index in range(len(dataset)):
        row = dataset.row(index)
        content = dataset[index]
        assert (row.num_tokens, row.num_labels) == (content["length"], content["num_labels"])
        assert not row.is_read
        assert row.key == again.row(index).key
    assert len({dataset.row(index).key for index in range(len(dataset))}) == len(dataset)


def test_statistics_tell_the_fill_rate(tmp_path: Path) -> None:
    statistics = packed(tmp_path).statistics()
    num_tokens = sum(range(4, 16)) + 3
    assert statistics.num_samples == 13
    assert statistics.num_tokens == num_tokens
    assert statistics.fill_rate == num_tokens / (statistics.num_rows * 24)
    # The assistant's tokens, but for the first of the sample that begins with it.
    assert statistics.num_labels == sum(range(1, 13)) + 2


def test_calls_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    packed(tmp_path)
    path = tmp_path / "chats.jsonl"
    with pytest.raises(StateError, match="comes after encode"):
        PackingDataset(path).set_template(ByteTemplate(24)).pack_dataset()
    encoded = PackingDataset(path).set_template(ByteTemplate(24)).encode()
    with pytest.raises(StateError, match="not packed yet"):
        encoded[0]
    with pytest.raises(ConfigError, match="needs a length to pack to"):
        PackingDataset(path).set_template(ByteTemplate()).encode().pack_dataset()
    with pytest.raises(ConfigError, match="needs every row's length"):
        PackingDataset(path).set_template(ByteTemplate(24)).encode(lazy=True).pack_dataset()
    with pytest.raises(StateError, match="comes before pack_dataset"):
        encoded.pack_dataset().filter(lambda row: True)


@pytest.mark.parametrize("name", ["weights", "ref_logps", "reward"])
def test_a_column_that_a_loss_may_take_is_not_left_out_unsaid(tmp_path: Path, name: str) -> None:
    path = tmp_path / "chats.jsonl"
    row: dict[str, Any] = {"messages": [{"role": "assistant", "content": "hello"}]}
    value = 0.5 if name == "reward" else [0.5] * 5
    more = {**row, "label": True, "user_data": [1], "source": "text", "tools": []}

    def pack(*rows: dict[str, Any]) -> PackingDataset:
        path.write_text("\n".join(map(json.dumps, rows)))
        dataset = PackingDataset(path).set_template(ByteTemplate(24)).encode()
        return dataset.pack_dataset()

    assert len(pack(row, more)) == 1
    with pytest.raises(DataError, match=f"packing leaves out {name}") as raised:
        pack(row, {**more, name: value})
    assert "use Dataset: the trainer packs by itself" in (raised.value.hint or "")


def test_pairs_are_refused_by_the_rows_that_are_left(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": chat}, {"chosen": chat, "rejected": chat}]
    path.write_text("\n".join(map(json.dumps, rows)))

    class Both(ByteTemplate):
        """Encodes pairs too."""

        def encode(self, row: Any, add_generation_prompt: bool = False) -> dict[str, Any] | None:
            if "messages" in row:
                return super().encode(row, add_generation_prompt)
            return {"chosen_input_ids": [1, 2], "rejected_input_ids": [1, 3]}

    def encoded() -> PackingDataset:
        dataset = PackingDataset(path)
        dataset.set_template(Both(24)).encode()
        return dataset

    with pytest.raises(DataError, match="cannot be packed"):
        encoded().pack_dataset()
    chats = encoded().filter(lambda row: "messages" in row)
    assert len(chats.pack_dataset()) == 1
