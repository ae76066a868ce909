"""`megatrain plan`: which layouts it tries, keeps, ranks and prints."""

import argparse
import io
import json
import subprocess
import sys
import tomllib

import pytest

from megatrain.cli.plan import command, report
from megatrain.cli.plan.candidates import Cluster, candidates, meshes
from megatrain.config.estimate import Training
from megatrain.config.model import ModelConfig
from megatrain.config.run.sections import MeshSection
from megatrain.errors import ConfigError, UnknownFamilyError
from megatrain.parallel.layout import DeviceMesh


def run(*arguments):
    """Run the command's own parser and function."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *arguments])
    return args.run(args)


def test_every_layout_of_the_world_is_tried_once():
    found = list(meshes(8, 8, 0))
    assert len(set(found)) == len(found)
    assert {mesh.world_size for mesh in found} == {8}
    # tp * pp * cp * dp = 2^3 has (3 + 3 choose 3) = 20 solutions.
    assert len([mesh for mesh in found if mesh.vpp == mesh.fsdp == 1]) == 20
    assert {mesh.vpp for mesh in found} == {1, 2, 4}
    assert {mesh.fsdp for mesh in found} == {1, 2, 4, 8}
    assert all(mesh.pp > 1 for mesh in found if mesh.vpp > 1)
    assert max(mesh.tp for mesh in meshes(8, 2, 0)) == 2
    assert DeviceMesh(tp=2, dp=4, ep=8) in set(meshes(8, 8, 128))


def test_experts_are_split_over_all_of_tp_or_not_at_all():
    found = set(meshes(4, 4, 8))
    assert {(mesh.tp, mesh.etp) for mesh in found} == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)}
    assert {mesh.etp for mesh in meshes(4, 4, 8, splits_experts=False)} == {1}


def test_a_whole_model_that_does_not_fit_replicated_is_sharded():
    """8.2 G parameters in bf16 with float32 gradients: 49 GB on every rank unless they are cut."""
    config = command.load_config("qwen3-8b")
    found = candidates(config, Training(lora=None), Cluster("h100", 8, 8, 80e9))
    by_mesh = {each.mesh: each for each in found}
    plain, sharded = by_mesh[DeviceMesh(dp=8)], by_mesh[DeviceMesh(dp=8, fsdp=8)]
    assert not plain.fits
    assert sharded.fits
    whole, part = plain.estimate.ranks[0], sharded.estimate.ranks[0]
    assert part.gradients == pytest.approx(whole.gradients / 8, rel=1e-6)
    assert part.weights < whole.weights / 3  # an eighth, and two gathered embeddings
    assert sharded.estimate.time.communication > plain.estimate.time.communication


def test_interleaving_waits_less_and_sends_more():
    config = command.load_config("qwen3-8b")
    found = candidates(config, Training(), Cluster("h100", 8, 8, 80e9))
    by_mesh = {each.mesh: each.estimate.time for each in found}
    plain, interleaved = by_mesh[DeviceMesh(pp=2, dp=4)], by_mesh[DeviceMesh(pp=2, dp=4, vpp=2)]
    assert interleaved.bubble == pytest.approx(plain.bubble / 2)
    assert interleaved.communication > plain.communication


def test_muon_on_a_whole_model_is_not_planned_with_fsdp():
    config = command.load_config("qwen3-8b")
    training = Training(lora=None, optimizer="Muon")
    found = candidates(config, training, Cluster("h100", 8, 8, 80e9))
    assert {each.mesh.fsdp for each in found} == {1}


def test_what_fits_comes_first_and_is_ranked_by_time():
    config = command.load_config("qwen3-8b")
    found = candidates(config, Training(), Cluster("h100", 8, 8, 60e9))
    fitting = [each for each in found if each.fits]
    assert 0 < len(fitting) < len(found)
    assert found[: len(fitting)] == fitting
    times = [each.seconds_per_token for each in fitting]
    assert times == sorted(times)
    assert all(each.estimate.peak <= 60e9 for each in fitting)
    assert len({each.estimate.tokens_per_step for each in found}) == 1


def test_layouts_that_the_model_does_not_allow_are_left_out():
    config = command.load_config("qwen3-30b-a3b")  # 4 key/value heads, 32 heads, 48 layers
    found = candidates(config, Training(lora=None), Cluster("h200", 10, 10, 141e9))
    assert {each.mesh.pp for each in found} <= {1, 2}
    assert all(128 % each.mesh.ep == 0 for each in found)


def test_activations_are_recomputed_where_nothing_fits_otherwise():
    config = command.load_config("qwen3-8b")
    training = Training(lora={"r": 8, "target_modules": "all-linear"}, sequence_length=32_768)
    found = candidates(config, training, Cluster("a100", 1, 1, 80e9))
    assert found[0].fits
    assert found[0].estimate.training.recompute


def test_plain_lines_where_the_output_is_no_terminal(capsys):
    status = run("--model", "qwen3-8b", "--gpus", "8", "--memory", "80GB", "--full", "--top", "3")
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0].startswith("8 x h100, 80 GB each: 3 of ")
    assert all(line.startswith("layout ") and line.endswith("fits") for line in lines[1:4])
    assert lines[4].startswith("best: ")
    assert lines[-1] == "megatrain train CONFIG.toml --nproc 8"


@pytest.mark.slow
def test_the_sections_are_toml_that_name_the_best_mesh():
    config = command.load_config("qwen3-30b-a3b")
    best = candidates(config, Training(), Cluster("h100", 64, 8, 80e9))[0]
    parsed = tomllib.loads("\n".join(report.toml(best)))
    assert DeviceMesh(**parsed["mesh"]) == best.mesh
    section = MeshSection(**parsed["mesh"])
    assert section.model_dump(exclude_defaults=True) == parsed["mesh"]
    assert ModelConfig(**parsed["model"]).max_tokens_per_microbatch == 4096
    assert "--nnodes 8" in report.command(Cluster("h100", 64, 8, 80e9))


def test_a_table_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cluster = Cluster("h100", 2, 2, 80e9)
    found = candidates(command.load_config("100m"), Training(), cluster)
    out = Terminal()
    report.show(found[:2], cluster, len(found), out)
    assert "│" in out.getvalue()
    assert found[0].mesh.describe() in out.getvalue()


def test_nothing_fits_is_said_and_is_a_failure(capsys):
    assert run("--model", "qwen3-8b", "--gpus", "1", "--memory", "10GB", "--full") == 1
    out = capsys.readouterr().out
    assert "too big" in out
    assert "none fits" in out


def test_json_has_every_number(capsys):
    assert run("--model", "100m", "--gpus", "2", "--json", "--precision", "no") == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["fits"]
    assert rows[0]["peak"] == max(rank["peak"] for rank in rows[0]["ranks"])


def test_a_hubs_model_is_planned_by_its_configuration_alone(tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        (tmp_path / "config.json").write_text(json.dumps(dict(command.load_config("100m"))))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert run("--model", "hf://owner/model", "--gpus", "2") == 0
    assert run("--model", "owner/model", "--gpus", "2") == 0
    assert asked == [("owner/model", ["config.json"])] * 2
    assert "best: " in capsys.readouterr().out


def test_an_offloaded_optimizer_leaves_room_on_the_device(capsys):
    arguments = ["--model", "qwen3-8b", "--gpus", "1", "--device", "h200", "--full"]
    run(*arguments, "--memory", "141GB")
    assert "too big" in capsys.readouterr().out
    assert run(*arguments, "--memory", "141GB", "--offload-optimizer") == 0
    assert "[optimizer]\noffload_optimizer = true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--model", "./nowhere", "--gpus", "1"], ConfigError, "no shape of this name"),
        (["--model", "qwen3.5-9b", "--gpus", "1"], UnknownFamilyError, "Qwen3_5TextConfig"),
        (["--model", "100m", "--gpus", "0"], ConfigError, "--gpus"),
        (["--model", "100m", "--gpus", "3", "--nodes", "2"], ConfigError, "multiple of --nodes"),
        (["--model", "100m", "--gpus", "1", "--memory", "lots"], ConfigError, "80GB"),
        (["--model", "100m", "--gpus", "1", "--device", "x"], ConfigError, "known: a100"),
        (["--model", "100m", "--gpus", "1", "--lora-rank", "0"], ConfigError, "r must"),
    ],
)
def test_wrong_options_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        run(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"), [("80GB", 80e9), ("1.5 GiB", 1.5 * 2**30), ("1000", 1000), ("2tb", 2e12)]
)
def test_amounts_of_memory(text, expected):
    assert command.parse_bytes(text) == expected


def test_planning_needs_no_torch():
    code = (
        "import sys, argparse; from megatrain.cli.plan import command;"
        "p = argparse.ArgumentParser(); command.add_parser(p.add_subparsers());"
        "a = p.parse_args(['plan', '--model', '100m', '--gpus', '2']); a.run(a);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
