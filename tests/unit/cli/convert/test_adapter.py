"""`megatrain convert adapter ...`: each sub-command as a user calls it."""

import argparse
import json
import shutil

import fsspec
import pytest
import torch

from megatrain.cli.convert import command
from megatrain.errors import CheckpointError, ConfigError, ExportError
from megatrain.export.peft_adapter import WEIGHTS
from megatrain.export.state.record import read_record, write_record
from tests.unit.export.adapters.made import (
    DENSE,
    STACKED,
    load_peft,
    logits,
    merged_by_peft,
    peft_adapter,
    same_bytes,
    tensors_in,
)


@pytest.fixture
def call(tmp_path, capsys):
    """Run `megatrain convert adapter ARGUMENTS` and return its report, and what it printed."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())

    def run(*arguments):
        report = tmp_path / "reports" / "report.json"
        args = parser.parse_args(
            ["convert", "adapter", *map(str, arguments), "--report", str(report)]
        )
        assert args.run(args) == 0
        return json.loads(report.read_text()), capsys.readouterr().out

    return run


def test_import_and_export_give_the_adapter_back(call, checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    report, printed = call("import", tmp_path / "peft", tmp_path / "state", "--verify")
    assert report["plan"]["what"] == "adapter import"
    assert "byte for byte" in report["result"]["verified"]
    assert "linears" in printed
    report, _ = call("export", tmp_path / "state", tmp_path / "out", "--verify")
    assert "PEFT was not asked" in report["result"]["verified"]
    assert same_bytes(tensors_in(tmp_path / "peft"), tensors_in(tmp_path / "out"))
    base = "--base", checkpoints("qwen3")
    report, _ = call("export", tmp_path / "state", tmp_path / "out", "--verify", *base)
    assert report["result"]["verified"] == "read back; PEFT takes exactly these tensors"


def test_export_for_vllm_says_how_to_start_it(call, checkpoints, tmp_path):
    folder = checkpoints("qwen3_moe")
    model = peft_adapter(folder, tmp_path / "peft", STACKED)
    call("import", tmp_path / "peft", tmp_path / "state", "--model-type", "qwen3_moe")
    report, printed = call(
        "export", tmp_path / "state", tmp_path / "out", "--for", "vllm", "--verify"
    )
    options = "--enable-lora --max-lora-rank 8 --lora-target-modules experts o_proj"
    assert report["result"]["vllm_options"] == options
    assert options in printed
    assert "every B A is the state's" in report["result"]["verified"]
    ours = load_peft(folder, tmp_path / "out")
    torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)


def test_merge_and_extract_undo_each_other(call, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    model = peft_adapter(folder, tmp_path / "peft", DENSE)
    expected = logits(model)
    places = folder, tmp_path / "peft", tmp_path / "merged"
    report, _ = call("merge", *places, "--verify")
    assert report["result"]["verified"] == "47 tensors, byte for byte"
    assert same_bytes(tensors_in(tmp_path / "merged"), merged_by_peft(model, tmp_path / "theirs"))
    report, printed = call(
        "extract", folder, tmp_path / "merged", tmp_path / "out", "--rank", 8, "--verify"
    )
    assert report["result"]["relative_error"] < 1e-5
    assert len(report["result"]["modules"]) == 28
    assert "worst module" in printed
    torch.testing.assert_close(
        logits(load_peft(folder, tmp_path / "out")), expected, rtol=0, atol=1e-4
    )


def test_resize_and_average_report_what_is_lost(call, checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "one", DENSE)
    peft_adapter(checkpoints("qwen3"), tmp_path / "two", DENSE, seed=1)
    report, _ = call("resize", tmp_path / "one", tmp_path / "out", "--rank", 2, "--verify")
    assert 0.1 < report["result"]["relative_error"] < 0.9
    assert report["plan"]["details"]["ranks"] == "2, 4, 8 -> 2"
    both = tmp_path / "one", tmp_path / "two", tmp_path / "both"
    report, _ = call("average", *both, "--weights", 0.75, 0.25, "--verify")
    assert report["result"]["verified"] == "read back; 0 of the sum is lost"
    report, _ = call("average", *both, "--rank", 4, "--verify")
    assert 0.1 < report["result"]["relative_error"] < 0.9
    with pytest.raises(ConfigError, match="--rank must be at least 1"):
        call("resize", tmp_path / "one", tmp_path / "out", "--rank", 0)
    with pytest.raises(ConfigError, match="one finite weight for each adapter"):
        call("average", *both, "--weights", 1)


@pytest.mark.parametrize("what", ["import", "export", "merge", "extract", "resize", "average"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(what, call, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    peft = peft_adapter(folder, tmp_path / "peft", DENSE)
    call("import", tmp_path / "peft", tmp_path / "state")
    merged_by_peft(peft, tmp_path / "tuned")
    arguments = {
        "import": (tmp_path / "peft",),
        "export": (tmp_path / "state",),
        "merge": (folder, tmp_path / "peft"),
        "extract": (folder, tmp_path / "tuned"),
        "resize": (tmp_path / "peft",),
        "average": (tmp_path / "peft", tmp_path / "peft"),
    }[what]
    more = ("--rank", 4) if what in ("extract", "resize") else ()
    before = sorted(path.name for path in tmp_path.iterdir())
    report, printed = call(what, *arguments, tmp_path / "out", *more, "--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "result" not in report
    assert report["plan"]["read_bytes"] > 0
    assert f"adapter {what}" in printed


def test_a_state_that_was_altered_or_holds_a_whole_model_is_refused(call, checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    call("import", tmp_path / "peft", tmp_path / "state")
    path = next((tmp_path / "state" / "state" / "master").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Exception, match=f"altered: {path}"):
        call("export", tmp_path / "state", tmp_path / "out")
    with pytest.raises(Exception, match="no training state"):
        call("export", tmp_path / "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="only a folder of the same kind"):
        call("resize", tmp_path / "peft", tmp_path / "other", "--rank", 2)
    assert (tmp_path / "peft" / WEIGHTS).is_file()


ALL = ["import", "export", "merge", "extract", "resize", "average"]


def arguments_of(what, folder, tmp_path):
    """Return the sources of a sub-command, and its options."""
    peft, state = tmp_path / "peft", tmp_path / "state"
    sources = {
        "import": (peft,),
        "export": (state,),
        "merge": (folder, peft),
        "extract": (folder, tmp_path / "tuned"),
        "resize": (peft,),
        "average": (peft, peft),
    }[what]
    return sources, ("--rank", 2) if what in ("extract", "resize") else ()


@pytest.fixture
def places(call, checkpoints, tmp_path):
    """Make `peft`, `state` and `tuned` of one base in tmp_path, and return the base."""
    folder = checkpoints("qwen3")
    model = peft_adapter(folder, tmp_path / "peft", DENSE)
    call("import", tmp_path / "peft", tmp_path / "state")
    merged_by_peft(model, tmp_path / "tuned")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ALL)
def test_what_is_read_is_never_written_over(what, call, places, tmp_path):
    sources, more = arguments_of(what, places, tmp_path)
    before = contents(tmp_path)
    for number, source in enumerate(dict.fromkeys(sources)):
        (tmp_path / f"link{number}").symlink_to(source)
        for out in (source, tmp_path / f"link{number}"):
            with pytest.raises(ExportError, match="OUT must be another folder than what is read"):
                call(what, *sources, out, *more)
        (tmp_path / f"link{number}").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ALL)
def test_a_training_state_is_never_written_over(what, call, places, tmp_path):
    """By import neither, unless the state is what an import wrote: it holds no training."""
    sources, more = arguments_of(what, places, tmp_path)
    other = shutil.copytree(tmp_path / "state", tmp_path / "other")
    record = read_record(other)
    (other / "state" / "state.json").unlink()
    write_record(other, record.model_copy(update={"imported": None, "step": 7}))
    before = contents(other)
    text = "only a folder of the same kind" if what == "import" else "not hold a training state"
    with pytest.raises(ExportError, match=text):
        call(what, *sources, other, *more)
    assert contents(other) == before
    if what == "import":
        call(what, *sources, tmp_path / "state")


def test_another_family_than_the_adapters_is_refused(call, checkpoints, tmp_path):
    path = tmp_path / "peft" / "adapter_config.json"
    peft_adapter(checkpoints("qwen3_moe"), tmp_path / "peft", STACKED)
    options = tmp_path / "peft", tmp_path / "state", "--model-type"
    with pytest.raises(ConfigError, match=r"type=mixtral, adapter_config.json tells qwen3_moe"):
        call("import", *options, "mixtral")
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    mapping = {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": "transformers"}
    path.write_text(json.dumps(config | {"auto_mapping": mapping}))
    with pytest.raises(ConfigError, match=r"type=gpt_oss, adapter_config.json tells qwen3_moe"):
        call("import", *options, "gpt_oss")
    assert not (tmp_path / "state").exists()
    call("import", *options, "qwen3_moe")


@pytest.mark.parametrize("what", ALL)
def test_only_what_can_be_gone_on_with_can_be_begun_anew(what, call, places, tmp_path):
    sources, more = arguments_of(what, places, tmp_path)
    arguments = what, *sources, tmp_path / "out", *more, "--restart"
    if what == "merge":
        call(*arguments)
    else:
        with pytest.raises(SystemExit):
            call(*arguments)


CHECKS = {
    "import": "megatrain.export.adapters.from_state.check_same_as",
    "export": "megatrain.cli.convert.adapter_export._verify",
    "merge": "megatrain.export.adapters.merge.verify_merge",
    "extract": "megatrain.export.adapters.extract.verify_extract",
    "resize": "megatrain.export.adapters.resize.distance",
    "average": "megatrain.export.adapters.resize.distance",
}


@pytest.mark.parametrize("what", CHECKS)
def test_what_fails_its_check_is_not_at_out(what, call, places, tmp_path, monkeypatch):
    sources, more = arguments_of(what, places, tmp_path)
    before = contents(tmp_path)

    def fail(*_):
        raise ExportError("not what was meant")

    monkeypatch.setattr(CHECKS[what], fail)
    with pytest.raises(ExportError, match="not what was meant"):
        call(what, *sources, tmp_path / "out", *more, "--verify")
    after = {path: each for path, each in contents(tmp_path).items() if path.name != "report.json"}
    assert after == {path: each for path, each in before.items() if path.name != "report.json"}


def test_places_may_be_urls(call, checkpoints, tmp_path):
    peft_adapter(checkpoints("qwen3"), tmp_path / "peft", DENSE)
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path / 'peft'}/", "/adapters/one/", recursive=True)
    call("import", "memory://adapters/one", "memory://adapters/state")
    call("export", "memory://adapters/state", tmp_path / "out")
    assert same_bytes(tensors_in(tmp_path / "peft"), tensors_in(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="something at memory://adapters/state already"):
        call("import", "memory://adapters/one", "memory://adapters/state")
    memory.rm("/adapters", recursive=True)
