"""Datasets: bad data are named, or left out and counted; wrong calls are refused."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatrain.data.dataset import Dataset
from megatrain.data.meta import DatasetMeta
from megatrain.errors import ConfigError, DataError, StateError
from tests.unit.data.byte_template import ByteTemplate
from tests.unit.data.test_dataset import CHATS, ROWS, chats, encoded, write_lines, write_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep `datasets`' cache in the test's folder, and its progress bars quiet."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"messages": [', r"bad\.jsonl, line 3 is not JSON: .* at column 15"),
        ("[1, 2]", r"bad\.jsonl, line 3 must be one JSON object: got list"),
        ("{}", r"bad\.jsonl, line 3: the row is empty"),
        ('{"messages": []}', r"bad\.jsonl, line 3: the row is empty"),
        ('{"prompt": "hi"}', r"bad\.jsonl, line 3: a row needs messages; it has \['prompt'\]"),
        (
            '{"messages": [{"role": "alien", "content": "hi"}]}',
            r"bad\.jsonl, line 3: unknown role 'alien'",
        ),
        (
            '{"messages": [{"role": "user"}]}',
            r"bad\.jsonl, line 3: the row has no column 'content'",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "x" * 200}]}),
            r"bad\.jsonl, line 3: 200 tokens are more than max_length 100",
        ),
    ],
)
def test_bad_rows_are_named_with_the_way_out(
    tmp_path: Path, bad: str, message: str, streaming: bool
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [CHATS[0], "", bad, CHATS[1]])

    def encode(**options: Any) -> list[dict[str, Any]]:
        dataset = Dataset(DatasetMeta(path), streaming=streaming, **options)
        return list(dataset.set_template(ByteTemplate(max_length=100)).encode())

    with pytest.raises(DataError, match=message) as raised:
        encode()
    assert "on_error='skip'" in (raised.value.hint or "")
    assert [row["length"] for row in encode(on_error="skip")] == [11, 12]


def test_wrong_columns_are_named_by_row_from_another_process(tmp_path: Path) -> None:
    dataset = Dataset(write_table(tmp_path / "data.csv"))
    with pytest.raises(DataError, match=r"data\.csv, row 1: the row has no column 'query'; it has"):
        dataset.map(lambda row: {"n": row["query"]}, num_proc=2)


def test_a_row_keeps_its_name_through_steps_and_mixing(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", CHATS)
    second = write_lines(
        tmp_path / "b.jsonl", [*CHATS, {"messages": [{"role": "x", "content": "y"}]}]
    )
    dataset = Dataset(first).add_dataset(second).filter(lambda row: True)
    dataset.mix_dataset(weights=[1, 1], stopping="all_exhausted")
    with pytest.raises(DataError, match=r"b\.jsonl, line 21: unknown role"):
        dataset.set_template(ByteTemplate()).encode()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_bytes_that_are_no_text_are_named_by_line(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"a": "b"}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl" if streaming else "latin.jsonl, line 2"):
        list(Dataset(DatasetMeta(path), streaming=streaming))


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2\n]')
    (tmp_path / "b.parquet").write_bytes(b"PAR1 cut short")
    (tmp_path / "c.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "e.jsonl").write_text("\n\n")
    for name, message in {
        "a.json": "a.json, line 4 is not JSON",
        "b.parquet": "cannot read .*b.parquet",
        "c.csv": "cannot read .*c.csv: .*line 3",
        "d.jsonl": "d.jsonl is empty",
        "e.jsonl": "e.jsonl.* no rows",
    }.items():
        with pytest.raises(DataError, match=message):
            Dataset(DatasetMeta(tmp_path / name))


def test_a_folder_with_files_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", ROWS)
    (tmp_path / "data" / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="files of several kinds"):
        Dataset(DatasetMeta(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        Dataset(DatasetMeta(tmp_path / "empty"))


def test_a_step_that_leaves_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"filter\(\) left out all of 5 rows"):
        Dataset(write_table(tmp_path / "data.jsonl")).filter(lambda row: False)
    path = write_lines(tmp_path / "bad.jsonl", [{"a": 1}, {"a": 2}])
    with pytest.raises(DataError, match=r"encode\(\) left out all of 2 rows"):
        Dataset(path, on_error="skip").set_template(ByteTemplate()).encode()


def test_calls_in_the_wrong_order_are_refused(tmp_path: Path) -> None:
    path = chats(tmp_path)
    with pytest.raises(StateError, match="needs a template"):
        Dataset(path).encode()
    with pytest.raises(StateError, match="no data yet"):
        Dataset().set_template(ByteTemplate()).encode()
    with pytest.raises(StateError, match=r"map\(\) comes before encode\(\)"):
        encoded(path).map(lambda row: row)
    with pytest.raises(ConfigError, match="can leave none out"):
        encoded(path, lazy=True, num_proc=2)
    lazy = Dataset(path).set_template(ByteTemplate(20, "delete")).encode(lazy=True)
    with pytest.raises(DataError, match="line 20: the template leaves this row out"):
        lazy.row(19)


def test_encoded_rows_can_be_filtered_by_their_tokens(tmp_path: Path) -> None:
    dataset = encoded(chats(tmp_path)).filter(lambda row: row["length"] <= 15)
    assert dataset.lengths.tolist() == [11, 12, 13, 14, 15]
    assert dataset.statistics().num_tokens == 65


def test_a_step_is_for_one_data_set_after_rows_were_read_too(tmp_path: Path) -> None:
    first, second = (DatasetMeta(write_lines(tmp_path / f"{n}.jsonl", ROWS)) for n in "ab")
    dataset = Dataset(first).add_dataset(second)
    assert dataset[7] == ROWS[2]
    dataset.map(lambda row: {"n": 0}, dataset_meta=second)
    assert dataset[7] == {"n": 0}
    dataset.filter(lambda row: row["answer"] < 2, dataset_meta=first)
    assert list(dataset) == ROWS[:2] + [{"n": 0}] * 5
    dataset.mix_dataset()
    with pytest.raises(StateError, match="the data sets are one by now"):
        dataset.map(lambda row: row, dataset_meta=second)


def test_hidden_and_cached_files_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    datasets.load_from_disk(str(folder)).map(lambda row: {"answer": -1})
    write_lines(folder / ".ipynb_checkpoints" / "data.jsonl", ROWS)
    (folder / "tmp12ab").with_suffix(".arrow").write_bytes(b"cut short")
    assert len(list(folder.glob("cache-*.arrow"))) == 1
    assert list(Dataset(folder)) == ROWS


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_a_batch_with_a_bad_row_loses_that_row_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [*ROWS[:2], {"answer": "x"}, *ROWS[2:]])

    def double(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"n": 2 * (row["answer"] + 0)} for row in rows]

    def run(on_error: Any) -> list[Any]:
        dataset = Dataset(DatasetMeta(path), streaming=streaming, on_error=on_error)
        return list(dataset.map(double, batched=True))

    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: TypeError"):
        run("raise")
    assert run("skip") == [{"n": 2 * number} for number in range(5)]
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "map() left out 1" in warned[0].getMessage()
    assert "rows.jsonl, line 3: TypeError" in warned[0].getMessage()


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_rows_left_out_are_counted_with_the_first_reasons(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [CHATS[0], *["{"] * 5, *[{"a": 1}] * 2])
    dataset = Dataset(DatasetMeta(path), streaming=streaming, on_error="skip")
    assert len(list(dataset.set_template(ByteTemplate()).encode())) == 1
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(texts) == 2
    assert "left out 5 rows" in texts[0]
    assert [f"line {number}" in texts[0] for number in (2, 3, 4, 5)] == [True, True, True, False]
    assert "encode() left out 2" in texts[1]
    assert "line 8: a row needs messages" in texts[1]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_tables_with_unlike_columns_are_named(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y\n1,2\n")
    (folder / "b.csv").write_text("x,y\n1,two\n")
    with pytest.raises(DataError, match=r"'y' is int64 in .*a\.csv, and \w+ in .*b\.csv"):
        list(Dataset(DatasetMeta(folder), streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streaming"])
def test_half_characters_are_named_by_line(tmp_path: Path, streaming: bool) -> None:
    path = write_lines(tmp_path / "half.jsonl", [CHATS[0], '{"text": "\\ud83d"}'])
    with pytest.raises(DataError, match=r"half\.jsonl, line 2: the row has half of a character"):
        list(Dataset(DatasetMeta(path), streaming=streaming))
    array = tmp_path / "half.json"
    array.write_text('[{"text": "\\ud83d"}]')
    with pytest.raises(DataError, match=r"half\.json, row 1: the row has half of a character"):
        list(Dataset(DatasetMeta(array), streaming=streaming))


def test_files_and_slices_without_rows_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    for streaming, chosen in ((False, range(7, 9)), (False, []), (True, range(3, 1))):
        with pytest.raises(DataError, match=r"data_slice=.* chooses none"):
            Dataset(DatasetMeta(path, data_slice=chosen), streaming=streaming)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    with pytest.raises(DataError, match="one JSON object over several lines") as raised:
        Dataset(whole)
    assert "the value of 'data'" in (raised.value.hint or "")


def test_lazy_encoding_of_a_stream_is_refused(tmp_path: Path) -> None:
    stream = Dataset(DatasetMeta(chats(tmp_path)), streaming=True).set_template(ByteTemplate())
    with pytest.raises(ConfigError, match="no effect on a stream"):
        stream.encode(lazy=True)
