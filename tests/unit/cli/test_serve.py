"""What `megatrain serve` makes of its options."""

import argparse
from pathlib import Path

import pytest

from megatrain.cli.serve.command import add_parser
from megatrain.cli.serve.options import OF_A_MODEL, build_config
from megatrain.errors import ConfigError


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *options])


def test_options_make_one_model():
    config = build_config(parsed("--model", "base", "--name", "m", "--ranks", "2", "--tp", "2"))
    (model,) = config.models
    assert (model.name, model.path, model.ranks, model.tp) == ("m", "base", 2, 2)


def test_a_model_of_full_parameters_is_not_sampled_from():
    (model,) = build_config(parsed("--model", "base", "--full-parameters")).models
    assert model.full_parameters
    assert model.sampler.engine == "none"
    with pytest.raises(ConfigError, match=r"sampler\.engine must be 'none'"):
        build_config(parsed("--model", "base", "--full-parameters", "--sampler", "transformers"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--ranks", "2"), "--ranks"),
        (("--sampler", "none", "--full-parameters"), "--full-parameters, --sampler"),
        (("--name", "m"), "--name"),
    ],
)
def test_an_option_without_effect_beside_a_file_is_refused(tmp_path: Path, options, named):
    file = tmp_path / "service.toml"
    file.write_text('models = [{name = "m", path = "base"}]\n')
    with pytest.raises(ConfigError, match=f"{named} would have no effect"):
        build_config(parsed("--config", str(file), *options))
    assert build_config(parsed("--config", str(file), "--port", "1")).port == 1


def test_every_option_of_a_model_is_known_as_one():
    given = vars(parsed("--model", "base")).keys()
    others = {"model", "demo", "config", "out", "run", "no_keys"}
    others |= {"host", "port", "data", "database", "files", "log_format"}
    assert set(OF_A_MODEL) == given - others


def test_a_folder_for_the_demo_needs_the_demo():
    with pytest.raises(ConfigError, match="--demo"):
        build_config(parsed("--model", "base", "--out", "there"))
