"""`megatrain data stats`: its numbers, its files, and what it refuses."""

import argparse
import json
from pathlib import Path

import datasets
import pytest

from megatrain.cli.data import command
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.errors import ConfigError, DataError

CHATS = [
    [
        {"role": "user", "content": "one two three"},
        {"role": "assistant", "content": "four " * (index + 1)},
    ]
    for index in range(30)
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer, and chats beside it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "model"
    build_tokenizer(["one two three four"], vocab_size=300).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    lines = [json.dumps({"messages": messages}) for messages in CHATS]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    return folder


def parse(*options: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["data", "stats", *map(str, options)])


def test_numbers_are_those_of_the_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in CHATS]
    limit = sorted(lengths)[-6]
    options = ("--model", model, "--max-length", str(limit), "--packing", "--out", tmp_path / "out")
    args = parse(tmp_path / "chats.jsonl", *options)
    assert args.run(args) == 0
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    fitting = [length for length in lengths if length <= limit]
    assert stats["rows"] == 30
    assert stats["tokens"] == sum(lengths)
    assert stats["longest"] == max(lengths)
    assert stats["rows over max length"] == 30 - len(fitting)
    assert stats["fill rate"] == round(sum(fitting) / (stats["packed rows"] * limit), 4)
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "fill rate" in printed
    assert f"{sum(lengths):,}" in printed


def test_a_preprocessor_takes_its_options(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": "who are you?", "response": "I am {{NAME}} by {{AUTHOR}}", "tag": "en"}] * 3
    (tmp_path / "self.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = parse(
        tmp_path / "self.jsonl",
        *("--model", model, "--preprocessor", "SelfCognitionProcessor"),
        *("--option", "model_name=one", "--option", "model_author=two"),
    )
    assert args.run(args) == 0
    assert "median" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packing"], "--packing needs a length"),
        (["--max-length", "0"], "--max-length must be at least 1"),
        (["--trust-remote-code"], "no effect without --preprocessor"),
        (["--option", "a=1"], "no effect without --preprocessor"),
        (["--preprocessor", "AlpacaProcesor"], "unknown preprocessor 'AlpacaProcesor'"),
        (["--preprocessor", "AlpacaProcessor", "--option", "a"], "must be KEY=VALUE"),
    ],
)
def test_what_cannot_work_is_refused(
    model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    args = parse(tmp_path / "chats.jsonl", "--model", model, *options)
    with pytest.raises(ConfigError, match=message):
        args.run(args)


def test_a_preprocessor_in_a_file_runs_where_it_is_trusted(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "steps.py"
    file.write_text("def step(row):\n    return row\n")
    args = parse(tmp_path / "chats.jsonl", "--model", model, "--preprocessor", f"{file}:step")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        args.run(args)
    args.trust_remote_code = True
    assert args.run(args) == 0


def test_pairs_are_not_packed(model: Path, tmp_path: Path) -> None:
    other = {"role": "assistant", "content": "three"}
    rows = [{"chosen": chat, "rejected": [chat[0], other]} for chat in CHATS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--model", model, "--max-length", "4096", "--packing")
    args = parse(tmp_path / "pairs.jsonl", *options)
    with pytest.raises(ConfigError, match="cannot be packed"):
        args.run(args)


def test_bad_rows_are_named_or_left_out_when_asked(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(path.read_text() + '\n{"messages": []}\n')
    args = parse(path, "--model", model, "--out", tmp_path / "out")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 31") as raised:
        args.run(args)
    assert "--skip-bad-rows" in (raised.value.hint or "")
    args = parse(path, "--model", model, "--out", tmp_path / "out", "--skip-bad-rows")
    assert args.run(args) == 0
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["rows"] == 30
    assert "left out 1 of 31 rows" in caplog.text
