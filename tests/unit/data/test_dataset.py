"""Datasets: what is read, what steps do to rows, what is cached, and how bad data are named."""

import gc
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from megatrain.data.dataset import Dataset
from megatrain.data.meta import DatasetMeta
from megatrain.errors import ConfigError, DataError
from tests.unit.data.byte_template import ByteTemplate

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"question {index}"},
            {"role": "assistant", "content": "a" * (index + 1)},
        ]
    }
    for index in range(20)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep `datasets`' cache in the test's folder, and its progress bars quiet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def chats(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "chats.jsonl", CHATS)


def encoded(path: Path, **options: Any) -> Dataset:
    dataset = Dataset(DatasetMeta(path))
    dataset.set_template(ByteTemplate())
    return dataset.encode(**options)


ROWS = [{"question": f"q{index}", "answer": index} for index in range(5)]


def write_table(path: Path) -> Path:
    table = datasets.Dataset.from_list(ROWS)
    if path.suffix == ".csv":
        table.to_csv(str(path))
    elif path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif path.suffix == ".jsonl":
        write_lines(path, ROWS)
    else:
        with datasets.arrow_writer.ArrowWriter(path=str(path), features=table.features) as writer:
            for row in ROWS:
                writer.write(row)
            writer.finalize()
    return path


# `datasets` leaves a csv file open that it streams from; collected here, it warns here.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_its_rows(tmp_path: Path, suffix: str, streaming: bool) -> None:
    path = write_table(tmp_path / f"data{suffix}")
    assert list(Dataset(DatasetMeta(str(path)), streaming=streaming)) == ROWS
    gc.collect()


def test_a_json_file_may_have_an_object_on_each_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.json", ["", *ROWS, ""])
    assert list(Dataset(DatasetMeta(path))) == ROWS


def test_a_folder_is_its_files_by_split_and_subset(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "main" / "train-1.jsonl", ROWS[:2])
    write_lines(tmp_path / "data" / "main" / "train-2.jsonl", ROWS[2:4])
    write_lines(tmp_path / "data" / "main" / "test.jsonl", ROWS[4:])
    folder = tmp_path / "data"
    assert list(Dataset(DatasetMeta(folder, "main"))) == ROWS[:4]
    assert list(Dataset(DatasetMeta(folder, "main", "test"))) == ROWS[4:]
    with pytest.raises(DataError, match="no files of the split 'validation'") as raised:
        Dataset(DatasetMeta(folder, "main", "validation"))
    assert "test, train" in str(raised.value)
    with pytest.raises(DataError, match="no folder for the subset 'socratic'"):
        Dataset(DatasetMeta(folder, "socratic"))


def test_a_folder_whose_files_name_no_split_is_all_train(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", ROWS[:2])
    write_lines(tmp_path / "data" / "b.jsonl", ROWS[2:])
    assert list(Dataset(DatasetMeta(tmp_path / "data"))) == ROWS


@pytest.mark.parametrize(
    ("data_slice", "numbers"),
    [
        (range(1, 3), [1, 2]),
        (range(3, 1000), [3, 4]),
        (range(0, 9, 2), [0, 2, 4]),
        (slice(None, 2), [0, 1]),
        (slice(-2, None), [3, 4]),
        ([4, 0, 0], [4, 0, 0]),
        ((index for index in (1, 3)), [1, 3]),
    ],
)
def test_a_slice_chooses_rows(tmp_path: Path, data_slice: Any, numbers: list[int]) -> None:
    path = write_table(tmp_path / "data.jsonl")
    meta = DatasetMeta(path, data_slice=data_slice)
    assert [row["answer"] for row in Dataset(meta)] == numbers


@pytest.mark.parametrize(
    ("data_slice", "numbers"),
    [
        (range(1, 3), [1, 2]),
        (range(3, 1000), [3, 4]),
        (slice(None, 2), [0, 1]),
        (slice(3, None), [3, 4]),
    ],
)
def test_a_slice_of_a_stream_starts_and_stops(
    tmp_path: Path, data_slice: Any, numbers: list[int]
) -> None:
    meta = DatasetMeta(write_table(tmp_path / "data.jsonl"), data_slice=data_slice)
    assert [row["answer"] for row in Dataset(meta, streaming=True)] == numbers


@pytest.mark.parametrize("data_slice", [range(0, 5, 2), slice(-2, None), [0, 1]])
def test_other_slices_of_a_stream_are_refused(tmp_path: Path, data_slice: Any) -> None:
    meta = DatasetMeta(write_table(tmp_path / "data.jsonl"), data_slice=data_slice)
    with pytest.raises(ConfigError, match="a stream is read from its start"):
        Dataset(meta, streaming=True)


def test_files_of_several_kinds_make_one_data_set(tmp_path: Path) -> None:
    table, lines = write_table(tmp_path / "a.csv"), write_table(tmp_path / "b.jsonl")
    assert list(Dataset(table).add_dataset(lines)) == ROWS + ROWS


def test_a_number_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="has 5 rows, and data_slice asks for row 7"):
        Dataset(DatasetMeta(path, data_slice=[0, 7]))


def test_a_file_that_is_not_there_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        Dataset(DatasetMeta(str(tmp_path / "nothing.jsonl")))
    with pytest.raises(ConfigError, match="unknown scheme 's3'"):
        Dataset(DatasetMeta("s3://bucket/rows.jsonl"))


def test_a_hub_id_goes_to_the_hub_without_running_its_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load_dataset(*args: Any, **options: Any) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(Dataset(DatasetMeta("hf://openai/gsm8k", "main", "test"))) == ROWS
    assert list(Dataset("openai/gsm8k")) == ROWS
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test", "streaming": False}),
        (("openai/gsm8k", None), {"split": "train", "streaming": False}),
    ]


def test_modelscope_ids_are_downloaded_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / "self_cognition.jsonl")
    hub = SimpleNamespace(dataset_snapshot_download=lambda name, allow_patterns: tmp_path)
    monkeypatch.setitem(sys.modules, "modelscope", hub)
    assert list(Dataset(DatasetMeta("ms://swift/self-cognition"))) == ROWS
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(DataError, match="needs the package modelscope") as raised:
        Dataset(DatasetMeta("ms://swift/self-cognition"))
    assert "pip install modelscope" in str(raised.value)


def test_steps_neither_add_nor_drop_keys(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int"}}}}
    other = {"type": "function", "function": {"name": "g", "parameters": {"y": [1, 2.5, None]}}}
    rows = [
        {"messages": [{"role": "user", "content": "hi"}], "tools": [tool]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"n": 1}]}]},
        {"messages": [{"role": "user", "content": "é"}], "tools": [other], "user_data": {"a": 1}},
    ]
    dataset = Dataset(write_lines(tmp_path / "tools.jsonl", rows))
    assert list(dataset) == rows
    assert list(dataset.map(lambda row: {**row, "more": 1})) == [{**row, "more": 1} for row in rows]


def test_map_and_filter_replace_and_choose_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset(write_table(tmp_path / "data.csv"))
    with caplog.at_level(logging.INFO, "megatrain"):
        dataset.map(lambda row: {"n": row["answer"] + 1} if row["answer"] else None)
    assert list(dataset) == [{"n": 2}, {"n": 3}, {"n": 4}, {"n": 5}]
    assert "map() left out 1 of 5 rows" in caplog.text
    assert list(dataset.filter(lambda row: row["n"] > 3)) == [{"n": 4}, {"n": 5}]
    dataset.map(lambda rows: [{"sum": sum(row["n"] for row in rows)}, None], batched=True)
    assert list(dataset) == [{"sum": 9}]


def test_options_go_to_the_function(tmp_path: Path) -> None:
    def add(row: dict[str, Any], amount: int) -> dict[str, Any]:
        return {"n": row["answer"] + amount}

    dataset = Dataset(write_table(tmp_path / "data.jsonl"))
    with pytest.raises(ConfigError, match="no option 'amuont'"):
        dataset.map(add, amuont=3)
    assert dataset.map(add, amount=3)[0] == {"n": 3}


@pytest.mark.parametrize("options", [{}, {"batched": True}, {"num_proc": 2}, {"lazy": True}])
def test_encoding_keeps_messages_and_adds_tokens(tmp_path: Path, options: dict[str, Any]) -> None:
    dataset = encoded(chats(tmp_path), **options)
    assert len(dataset) == 20
    row = dataset[11]
    ids = list(b"question 11" + b"a" * 12)
    assert row == {
        "input_ids": ids,
        "labels": [-100] * 11 + ids[11:],
        "length": 23,
        "num_labels": 12,
        "messages": CHATS[11]["messages"],
    }


def test_a_row_is_not_read_for_its_sizes_and_its_key_is_its_content(tmp_path: Path) -> None:
    stored = encoded(chats(tmp_path))
    row = stored.row(3)
    assert (row.num_tokens, row.num_labels, row["length"]) == (14, 4, 14)
    assert not row.is_read
    assert row["input_ids"] == list(b"question 3aaaa")
    assert row.is_read
    again = encoded(write_lines(tmp_path / "other.jsonl", CHATS[3:]), lazy=True)
    assert again.row(0).key == row.key
    assert again.row(1).key != row.key


def test_a_prompt_has_no_labels(tmp_path: Path) -> None:
    row = encoded(chats(tmp_path), add_generation_prompt=True)[0]
    assert row["num_labels"] == 0
    assert set(row["labels"]) == {-100}


def test_a_stream_is_encoded_as_it_is_read(tmp_path: Path) -> None:
    stream = Dataset(DatasetMeta(chats(tmp_path)), streaming=True)
    stream.map(lambda row: row).filter(lambda row: "3" in row["messages"][0]["content"])
    stream.set_template(ByteTemplate()).encode()
    assert [row["length"] for row in stream] == [14, 25]
    with pytest.raises(TypeError, match="no length"):
        len(stream)
    with pytest.raises(ConfigError, match="num_proc=2 has no effect on a stream"):
        Dataset(DatasetMeta(chats(tmp_path)), streaming=True).map(lambda row: row, num_proc=2)


def test_results_come_from_the_cache_until_code_options_or_data_change(tmp_path: Path) -> None:
    path, calls = write_table(tmp_path / "data.jsonl"), tmp_path / "calls"

    class Count:
        def __init__(self, add: int) -> None:
            self.add = add

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            with calls.open("a") as file:
                file.write("x")
            return {"n": row["answer"] + self.add}

    def run(add: int, **options: Any) -> int:
        """Return how often the function was called."""
        calls.write_text("")
        dataset = Dataset(path).map(Count(add).__call__, **options)
        assert dataset[1] == {"n": 1 + add}
        return len(calls.read_text())

    assert run(1) == 5
    assert run(1) == 0
    assert run(1, load_from_cache_file=False) == 5
    assert run(2) == 5
    assert run(2) == 0
    write_lines(path, ROWS[:3])
    assert run(2) == 3


def test_another_template_is_not_served_from_the_cache(tmp_path: Path) -> None:
    path = chats(tmp_path)
    whole = Dataset(path).set_template(ByteTemplate()).encode()
    short = Dataset(path).set_template(ByteTemplate(max_length=20, truncation_strategy="delete"))
    assert len(whole) == 20
    assert len(short.encode()) == 10
    assert len(Dataset(path).set_template(ByteTemplate()).encode()) == 20


def test_data_sets_follow_each_other_or_are_mixed_with_weights(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"from": "a"}] * 1000)
    second = write_lines(tmp_path / "b.jsonl", [{"from": "b"}] * 1000)
    one_after_another = Dataset(first).add_dataset(DatasetMeta(second))
    assert [row["from"] for row in one_after_another] == ["a"] * 1000 + ["b"] * 1000

    def mixed(seed: int, **options: Any) -> str:
        dataset = Dataset(first).add_dataset(DatasetMeta(second))
        dataset.mix_dataset(weights=[3, 1], seed=seed, **options)
        return "".join(row["from"] for row in dataset)

    drawn = mixed(1)
    assert drawn == mixed(1) != mixed(2)
    # 1000 of "a" are 3/4 of the draws: 333 of "b", with a standard deviation of 21.
    assert drawn.count("a") == 1000
    assert 250 < drawn.count("b") < 416
    everything = mixed(1, stopping="all_exhausted")
    assert everything.count("b") >= 1000
    assert everything.count("a") > 2500
    with pytest.raises(ConfigError, match="one positive number for each of 2 data sets"):
        Dataset(first).add_dataset(second).mix_dataset(weights=[1, 0])


def test_a_step_may_be_for_one_data_set(tmp_path: Path) -> None:
    first, second = (DatasetMeta(write_lines(tmp_path / f"{n}.jsonl", ROWS)) for n in "ab")
    dataset = Dataset(first).add_dataset(second)
    dataset.map(lambda row: {"n": 0}, dataset_meta=second)
    assert list(dataset) == ROWS + [{"n": 0}] * 5
    with pytest.raises(ConfigError, match="was not added"):
        Dataset(first).map(lambda row: row, dataset_meta=second)
