"""`megatrain bench convert`: its checkpoint's size, its table, its verdict; all of it, once."""

import argparse
import json

import pytest

from megatrain.cli.bench import command
from megatrain.cli.bench.convert import race, table
from megatrain.cli.bench.convert.command import make_job
from megatrain.cli.bench.convert.job import ConvertJob
from megatrain.cli.bench.convert.race import OtherBytesError, Outcome
from megatrain.errors import ConfigError


def parse(*options):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", "convert", *map(str, options)])


def job(tmp_path, **changes):
    values = {"folder": tmp_path, "checkpoint": tmp_path / "c", "gigabytes": 4.0} | changes
    return ConvertJob(**values)


@pytest.mark.parametrize("gigabytes", [1.0, 4.0, 30.0])
def test_a_checkpoint_is_of_the_size_that_was_asked_for(gigabytes, tmp_path):
    import transformers

    shape = job(tmp_path, gigabytes=gigabytes).shape
    config = transformers.Qwen3Config(**shape.fields)
    import torch

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    assert abs(size / 1e9 - gigabytes) < 0.06


def test_a_job_is_the_same_in_every_process(tmp_path):
    made = job(tmp_path, workers=2, repeats=3)
    assert ConvertJob.read(made.write()) == made


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--workers", 0], "--workers must be at least 1: 0"),
        (["--gigabytes", -1], "--gigabytes must be between"),
        (["--gigabytes", 999], "of disk"),
    ],
)
def test_what_cannot_be_is_refused(options, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        make_job(parse(*options), tmp_path)


def answers(seconds, growth):
    return [{"seconds": seconds, "growth": growth, "bytes": 0, "resident": 0, "cpu_seconds": 0}]


def test_the_table_has_times_memory_and_ratios(tmp_path):
    found = Outcome(4_000_000_000, 200_000_000, copies=[4.0])
    found.answers["ours", "import"] = answers(8.0, 150_000_000)
    found.answers["peer", "import"] = answers(16.0, 3_000_000_000)
    found.answers["ours", "export"] = answers(10.0, 330_000_000)
    lines = table.lines(job(tmp_path), found)
    assert lines[0][:4] == ["cp -r", "4.0", "1,000", "1.00x"]
    assert lines[1] == ["megatrain, import", "8.0", "500", "2.00x", "150", "0.50x"]
    assert lines[3] == ["import: ours / Bridge's", "0.50x", "", "", "0.05x", ""]
    assert lines[4] == ["megatrain, export", "10.0", "400", "2.50x", "330", "1.10x"]
    assert json.dumps(table.to_json(job(tmp_path), found))


def test_a_result_of_ours_with_other_bytes_has_no_time(tmp_path, monkeypatch):
    for name in ("ours-back", "ours-middle"):
        (tmp_path / name).mkdir()
    from types import SimpleNamespace

    from megatrain.export.compare import files, place, source

    monkeypatch.setattr(place, "recognise", lambda path: path)
    monkeypatch.setattr(source, "open_source", lambda path: path)
    monkeypatch.setattr(files, "compare_files", lambda *_, **__: SimpleNamespace(same=False))
    with pytest.raises(OtherBytesError, match="byte for byte"):
        race._compare(job(tmp_path), Outcome(1, 1), "ours")


@pytest.mark.slow
def test_all_of_it_with_a_tiny_checkpoint(tmp_path, capsys):
    args = parse("--gigabytes", 0, "--cache", tmp_path, "--out", tmp_path / "out.json")
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "import: ours / Bridge's" in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["same_bytes"] == {"ours": True, "peer": True}
    assert len(found["table"]) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convert-0gb-seed0", "out.json"]
