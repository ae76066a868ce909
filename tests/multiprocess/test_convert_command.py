"""`megatrain convert import` and `export` as a user calls them: plans, reports, mistakes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatrain.checkpoint.safetensors_folder import INDEX
from tests.fixtures import quantized_files
from tests.multiprocess import convert_tasks
from tests.multiprocess.conversion_tasks import different

pytestmark = pytest.mark.multiprocess

WEIGHTS = "model.safetensors"


@pytest.fixture
def convert(ranks):
    """Run `megatrain convert ARGUMENTS`; return (status, output, error output)."""

    def run(*arguments):
        given = ["convert", *(str(each) for each in arguments)]
        return ranks.run(convert_tasks.command, None, *given)[0]

    return run


@pytest.fixture
def sharded(checkpoints, tmp_path):
    """A checkpoint of four files with an index, to be broken."""
    folder = tmp_path / "sharded"
    shutil.copytree(checkpoints("qwen3"), folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        part = names[number::4]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.slow
def test_import_and_export_on_two_processes_report_and_verify(convert, sharded, tmp_path):
    report, middle, back = (tmp_path / name for name in ("report.json", "middle", "back"))
    options = ["--workers", 2, "--verify", "--report", report]
    status, printed, _ = convert(
        "import", sharded, middle, "--tp", 2, "--file-size", "64KB", *options
    )
    assert status == 0
    found = json.loads(report.read_text())
    assert found["plan"]["details"]["layout"] == "tp2"
    assert found["plan"]["read_bytes"] == sum(
        t.nbytes for p in sharded.glob("*.safetensors") for t in load_file(p).values()
    )
    assert found["result"]["verified"] == found["plan"]["num_tensors"] == 47
    assert found["seconds"] > 0
    assert "tp2" in printed
    assert len(list(middle.glob("iter_*/*.distcp"))) > 4
    assert convert("export", middle, back, *options)[0] == 0
    assert different(sharded, back) == []
    assert json.loads((back / INDEX).read_text())["weight_map"].keys() == set(
        json.loads((sharded / INDEX).read_text())["weight_map"]
    )
    assert (back / "config.json").read_bytes() == (sharded / "config.json").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_dry_run_says_what_it_takes_and_writes_nothing(convert, checkpoints, tmp_path):
    status, printed, _ = convert("import", checkpoints("qwen3"), tmp_path / "out", "--dry-run")
    assert status == 0
    for word in ("tensors", "read", "written", "memory", "time", "about"):
        assert word in printed
    assert not list(tmp_path.iterdir())


def test_a_cast_and_a_shard_size_are_kept_to(convert, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    assert convert("import", folder, tmp_path / "middle", "--dtype", "bf16", "--verify")[0] == 0
    more = ["--shard-size", "60KB", "--verify"]
    assert (
        convert("export", tmp_path / "middle", tmp_path / "back", "--dtype", "bf16", *more)[0] == 0
    )
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3
    original = load_file(folder / WEIGHTS)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, original[name].bfloat16())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_quantised_checkpoint_becomes_a_plain_one(convert, checkpoints, tmp_path):
    plain = checkpoints("deepseek_v3")
    folder = quantized_files.fp8_blocks(plain, tmp_path / "fp8", (8, 16))
    assert convert("import", folder, tmp_path / "middle", "--tp", 2, "--verify")[0] == 0
    assert convert("export", tmp_path / "middle", tmp_path / "back", "--verify")[0] == 0
    back, original = load_file(tmp_path / "back" / WEIGHTS), load_file(plain / WEIGHTS)
    assert back.keys() == original.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    for name, tensor in back.items():
        scale = original[name].abs().max()
        assert (tensor.float() - original[name]).abs().max() <= 0.07 * scale, name


def test_urls_are_read_and_written_through_fsspec(ranks, checkpoints):
    folder = checkpoints("qwen3")
    found = ranks.run(
        convert_tasks.through_memory,
        None,
        folder,
        [
            ["convert", "import", "memory://source", "memory://middle"],
            ["convert", "export", "memory://middle", "memory://back"],
            ["convert", "import", "memory://source", "memory://middle"],
        ],
    )[0]
    original = load_file(folder / WEIGHTS)
    assert [each[0] for each in found["said"]] == [0, 0, 1]
    assert "already" in found["said"][2][2]
    assert found["tensors"].keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in found["tensors"].items())
    assert found["left"] == []


def _missing_shard(folder):
    (folder / "model-00003-of-00004.safetensors").unlink()
    return "model-00003-of-00004.safetensors"


def _truncated_header(folder):
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return "cannot read shard"


def _absent_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.made.up"] = "model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return "model.layers.9.made.up"


def _outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model-00001-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    return "outside its folder"


def _pickled(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX).unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    return "--allow-pickle"


@pytest.mark.parametrize(
    "harm", [_missing_shard, _truncated_header, _absent_tensor, _outside, _pickled]
)
def test_a_broken_source_is_named_and_nothing_is_written(harm, convert, sharded, tmp_path):
    word = harm(sharded)
    status, _, said = convert("import", sharded, tmp_path / "out")
    assert status == 1
    assert word in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return print, ("run",)


def test_pickled_weights_are_read_when_allowed_and_only_tensors(convert, checkpoints, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    source = checkpoints("qwen3")
    shutil.copy(source / "config.json", folder)
    tensors = load_file(source / WEIGHTS)
    torch.save(tensors, folder / "pytorch_model.bin")
    options = ["--allow-pickle", "--verify"]
    assert convert("import", folder, tmp_path / "middle", *options)[0] == 0
    assert convert("export", tmp_path / "middle", tmp_path / "back")[0] == 0
    (file,) = (tmp_path / "back").glob("*.safetensors")
    back = load_file(file)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    torch.save({**tensors, "bad": Harmful()}, folder / "pytorch_model.bin")
    status, printed, said = convert("import", folder, tmp_path / "other", "--allow-pickle")
    assert status == 1
    assert "cannot read shard" in said
    assert "run" not in printed.split()


def test_a_damaged_megatron_checkpoint_is_named(convert, checkpoints, tmp_path):
    middle = tmp_path / "middle"
    assert convert("import", checkpoints("qwen3"), middle, "--tp", 2)[0] == 0
    (file,) = (middle / "iter_0000001").glob("__1_0.distcp")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    status, _, said = convert("export", middle, tmp_path / "back")
    assert status == 1
    assert "cut short or altered" in said
    assert file.name in said
    file.unlink()
    status, _, said = convert("export", middle, tmp_path / "back", "--restart")
    assert status == 1
    assert "missing: __1_0.distcp" in said
    assert not (tmp_path / "back").exists()


def test_a_target_that_holds_something_else_is_left_alone(convert, checkpoints, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    status, _, said = convert("import", checkpoints("qwen3"), tmp_path / "out")
    assert status == 1
    assert "only a folder of the same kind" in said
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def _not_an_object(folder):
    (folder / "config.json").write_text("[]")
    return "holds no JSON object"


def _fewer_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    fewer = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config | fewer))
    return "config.json counts 3"


def _another_head(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return "head and embedding are one"


@pytest.mark.parametrize("harm", [_not_an_object, _fewer_layers, _another_head])
def test_a_config_that_does_not_fit_is_named(harm, convert, sharded, tmp_path):
    word = harm(sharded)
    status, _, said = convert("import", sharded, tmp_path / "out")
    assert status == 1
    assert word in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharded"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["run", "dry"])
def test_a_layout_or_target_that_cannot_be_leaves_nothing_behind(
    more, convert, checkpoints, tmp_path
):
    folder = tmp_path / "source"
    shutil.copytree(checkpoints("gpt_oss"), folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    target = tmp_path / "out"
    cases = {
        "tp=3": [folder, target, "--tp", 3],
        "etp=2": [folder, target, "--tp", 2, "--etp", 2],
        "outside of what it is made of": [folder, folder / "inside"],
        "only a folder of the same kind": [folder, tmp_path / "full"],
        "not written to a hub": [folder, "hf://some/where"],
        "--workers must be at least 1": [folder, target, "--workers", 0],
    }
    for word, arguments in cases.items():
        status, _, said = convert("import", *arguments, *more)
        assert status == 1, word
        assert word in said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: {},
        lambda entries: {n: each | {"dtype": "complex64"} for n, each in entries.items()},
        lambda entries: {n: each | {"file": ".journal.0"} for n, each in entries.items()},
        lambda entries: {n: each | {"file": "../a.safetensors"} for n, each in entries.items()},
    ],
    ids=["empty", "dtype", "hidden", "outside"],
)
def test_a_list_of_tensors_that_was_altered_is_refused(change, convert, checkpoints, tmp_path):
    assert convert("import", checkpoints("qwen3"), tmp_path / "middle")[0] == 0
    path = tmp_path / "middle" / "hugging_face" / "tensors.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    status, _, said = convert("export", tmp_path / "middle", tmp_path / "back")
    assert status == 1
    assert "cut short or altered" in said
    assert sorted(each.name for each in tmp_path.iterdir()) == ["middle"]


CARRIED = ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja")
TEMPLATE = "additional_chat_templates/tool_use.jinja"


def test_tokenizer_and_templates_go_along_both_ways(convert, checkpoints, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(checkpoints("qwen3"), folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    for name in (*CARRIED, TEMPLATE, "train.py"):
        (folder / name).write_text(f'"{name}"')
    assert convert("import", folder, tmp_path / "middle")[0] == 0
    assert convert("export", tmp_path / "middle", tmp_path / "back")[0] == 0
    assert different(folder, tmp_path / "back") == []
    for name in (*CARRIED, TEMPLATE, "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes(), name
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    back = {
        str(path.relative_to(tmp_path / "back"))
        for path in (tmp_path / "back").rglob("*")
        if path.is_file()
    }
    assert names - back == {"train.py", "checkpoint-5/config.json"}


@pytest.mark.parametrize("place", ["some/model", "hf://some/model"])
def test_a_hubs_id_is_downloaded_and_converted(place, ranks, checkpoints, tmp_path):
    folder, middle = checkpoints("qwen3"), tmp_path / "middle"
    commands = [
        ["convert", "import", place, str(middle)],
        ["convert", "export", str(middle), str(tmp_path / "back"), "--config", place],
    ]
    said, asked = ranks.run(convert_tasks.with_hub, None, folder, commands)[0]
    assert [each[0] for each in said] == [0, 0]
    assert {each[0] for each in asked} == {"some/model"}
    assert not any(".bin" in pattern for each in asked for pattern in each[1])
    assert different(folder, tmp_path / "back") == []
