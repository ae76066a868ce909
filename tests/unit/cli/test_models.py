"""The matrix of architectures: what is shown of the record, in every form, and in README.md."""

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from distutils.core import run_setup

from megatrain.cli import main
from megatrain.cli.models.matrix import COLUMNS, RECORD, make_matrix, read_record, to_markdown

ROOT = Path(__file__).parents[3]
IN_README = re.compile(r"<!-- models -->\n(.*?)<!-- /models -->", re.DOTALL)


def row(**values: str) -> dict[str, str]:
    names = {"architecture": "XForCausalLM", "family": "X", "model_type": "x", "note": ""}
    return {**names, **dict.fromkeys(COLUMNS, "ok"), **values}


def test_readme_has_the_table_of_the_record():
    (table,) = IN_README.findall((ROOT / "README.md").read_text())
    assert table == to_markdown(make_matrix(read_record()))


def test_reasons_are_numbered_once_and_kept_out_of_the_cells():
    rows = [
        row(ep="no experts", pp="refused: PP=1: only", note="text alone"),
        row(pp="refused: PP=1: only", lora="refused: no names"),
    ]
    matrix = make_matrix(rows)
    assert matrix.notes == ("text alone", "PP=1: only", "no names")
    first, second = (dict(zip(matrix.header, cells, strict=True)) for cells in matrix.rows)
    assert (first["architecture"], first["PP"], first["EP"]) == ("XForCausalLM (1)", "no (2)", "-")
    assert (second["architecture"], second["PP"], second["LoRA"]) == (
        "XForCausalLM",
        "no (2)",
        "no (3)",
    )
    assert to_markdown(matrix).endswith("|\n\n1. text alone\n2. PP=1: only\n3. no names\n")


def test_a_column_that_no_test_has_written_is_not_tested(tmp_path):
    path = tmp_path / "record.json"
    without = {name: value for name, value in row().items() if name not in ("import", "vllm")}
    path.write_text(json.dumps([without]))
    (cells,) = make_matrix(read_record(path)).rows
    assert cells == ("X", "XForCausalLM", *["ok"] * 7, "not tested", "not tested")


def test_json_is_the_record_of_the_chosen_rows(capsys):
    assert main(["models", "--json", "PHI3"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    kept = json.loads(RECORD.read_text())
    (wanted,) = [each for each in kept if each["model_type"] == "phi3"]
    assert shown.items() >= wanted.items()
    assert shown.keys() >= COLUMNS.keys()


def test_a_name_that_nothing_has_is_an_error_with_what_is_known(capsys):
    assert main(["models", "no-such-model"]) == 1
    assert "qwen3_moe" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["80", "160"])
def test_the_table_shows_every_architecture_and_note(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[: -len(make_matrix(read_record()).notes)])) <= int(width)
    printed = "".join(lines)
    assert all(title in lines[0] for title in COLUMNS.values())
    assert all(note in printed for note in make_matrix(read_record()).notes)
    if width == "160":
        assert all(each["architecture"] in printed for each in read_record())


def test_the_command_needs_no_torch():
    code = "import sys; from megatrain.cli import main; main(['models']); "
    code += "sys.exit(bool({'torch', 'transformers', 'numpy'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, stdout=subprocess.DEVNULL)
    assert done.returncode == 0


def test_the_record_ships_with_the_package(monkeypatch):
    monkeypatch.chdir(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # setuptools on settings that pyproject.toml has
        build = run_setup("setup.py", stop_after="init").get_command_obj("build_py")
        build.ensure_finalized()
    shipped = {ROOT / folder / name for _, folder, _, names in build.data_files for name in names}
    assert RECORD in shipped
