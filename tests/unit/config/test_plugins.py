"""Plug-ins by name, module, entry point, file and hub; and what is refused."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest

import megatrain
from megatrain.config import plugins
from megatrain.config.plugins import build, known_names, register, resolve
from megatrain.data.filters import Filter, LengthFilter
from megatrain.data.preprocessors.base import Preprocessor
from megatrain.data.preprocessors.countdown import CountdownProcessor
from megatrain.data.preprocessors.self_cognition import SelfCognitionProcessor
from megatrain.data.preprocessors.text import TextProcessor
from megatrain.errors import ConfigError

CODE = """
from megatrain.data.filters import Filter

LOADED = []

class Short(Filter):
    def __init__(self, limit=3):
        self.limit = limit

    def __call__(self, row):
        return len(row["text"]) < self.limit

def plain(row):
    return True

NUMBER = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my-filters.py"
    path.write_text(CODE)
    return path


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    fresh = {kind: {} for kind in plugins.BASES}
    monkeypatch.setattr(plugins, "_registered", fresh)


@pytest.mark.parametrize("kind", sorted(plugins.BUILT_IN))
def test_every_built_in_name_is_there_and_of_its_kind(kind):
    for name in plugins.BUILT_IN[kind]:
        assert resolve(kind, name) is not None


def test_a_thing_is_found_by_name_by_module_and_as_itself():
    assert resolve("preprocessor", "CountdownProcessor") is CountdownProcessor
    spec = "megatrain.data.preprocessors.text:TextProcessor"
    assert resolve("preprocessor", spec) is TextProcessor
    assert resolve("preprocessor", TextProcessor) is TextProcessor
    ready = TextProcessor("body")
    assert resolve("preprocessor", ready) is ready
    assert resolve("filter", len) is len


def test_what_is_registered_is_found():
    @register("filter", "everything")
    class Everything(Filter):
        def __call__(self, row):
            return True

    assert resolve("filter", "everything") is Everything
    assert "everything" in known_names("filter")
    with pytest.raises(ConfigError, match="'LengthFilter' is a built-in filter"):
        register("filter", "LengthFilter")(Everything)


def test_an_entry_point_of_a_package_is_found(monkeypatch):
    entry = importlib.metadata.EntryPoint(
        name="tiny", value="megatrain.data.filters:LengthFilter", group="megatrain.filter"
    )
    entries = importlib.metadata.EntryPoints([entry])
    monkeypatch.setattr(plugins, "entry_points", lambda **params: entries.select(**params))
    assert resolve("filter", "tiny") is LengthFilter
    assert "tiny" in known_names("filter")
    assert "tiny" not in known_names("reward")


def test_a_file_is_run_only_on_request(file):
    spec = f"{file}:Short"
    with pytest.raises(ConfigError, match="would run a file's code") as raised:
        resolve("filter", spec)
    assert "trust_remote_code" in raised.value.hint
    short = resolve("filter", spec, trust_remote_code=True)
    assert issubclass(short, Filter)
    assert resolve("filter", spec, trust_remote_code=True) is short
    assert sys.modules[short.__module__].Short is short
    file.write_text(CODE.replace("< self.limit", "> self.limit"))
    assert resolve("filter", spec, trust_remote_code=True)()({"text": "long"})


def test_a_hub_repository_is_run_only_on_request(file, monkeypatch):
    asked = []

    def download(repository, name):
        asked.append((repository, name))
        if repository == "me/absent":
            raise OSError("404")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match="would run a file's code"):
        resolve("filter", "hf://me/filters:Short")
    assert asked == []
    assert resolve("filter", "hf://me/filters:Short", trust_remote_code=True).__name__ == "Short"
    resolve("filter", "hf://me/filters/more/short.py:Short", trust_remote_code=True)
    assert asked == [("me/filters", "filter.py"), ("me/filters", "more/short.py")]
    with pytest.raises(ConfigError, match="cannot download 'hf://me/absent': OSError: 404"):
        resolve("filter", "hf://me/absent:Short", trust_remote_code=True)
    with pytest.raises(ConfigError, match="does not name a hub repository"):
        resolve("filter", "gs://me/filters:Short", trust_remote_code=True)


def test_modelscope_has_the_same_form(file, monkeypatch):
    fake = SimpleNamespace(model_file_download=lambda repository, name: str(file))
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert resolve("filter", "ms://me/filters:plain", trust_remote_code=True)({}) is True


def test_a_file_that_fails_leaves_no_module_behind(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('half done')")
    with pytest.raises(ValueError, match="half done"):
        resolve("filter", f"{broken}:Short", trust_remote_code=True)
    assert not [name for name in sys.modules if name.startswith("megatrain_plugin_broken")]


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        ("filter", "LenghtFilter", "unknown filter 'LenghtFilter'; known: EmptyFilter, Length"),
        ("filters", "LengthFilter", "unknown kind of plug-in 'filters'"),
        ("filter", "no.such.module:Name", "cannot import 'no.such.module'"),
        ("filter", "a folder/file:Name", "is not the name of a module"),
        ("filter", "megatrain.data.filters:Nothing", "megatrain.data.filters has no 'Nothing'"),
        ("filter", "megatrain.data.preprocessors.text:TextProcessor", "must be a subclass of"),
        ("filter", TextProcessor, "must be a subclass of megatrain.data.filters.Filter"),
        ("filter", 3, "must be a subclass of megatrain.data.filters.Filter, or a function, not 3"),
        ("template", len, "template len must be a subclass of .*Template, not"),
    ],
)
def test_what_is_not_of_its_kind_is_refused(kind, spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve(kind, spec)


def test_missing_files_and_names_in_files_are_refused(file, tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        resolve("filter", f"{tmp_path}/absent.py:Short", trust_remote_code=True)
    with pytest.raises(ConfigError, match="has no 'Shrot'"):
        resolve("filter", f"{file}:Shrot", trust_remote_code=True)
    with pytest.raises(ConfigError, match="or a function, not 3"):
        resolve("filter", f"{file}:NUMBER", trust_remote_code=True)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError) as raised:
        resolve("preprocessor", "countdownprocesor")
    assert raised.value.hint == "did you mean 'CountdownProcessor'?"


def test_options_reach_the_constructor_and_unknown_ones_are_refused():
    options = {"model_name": "a", "model_author": "b"}
    built = build("preprocessor", "SelfCognitionProcessor", options)
    assert isinstance(built, SelfCognitionProcessor)
    assert built.names == {"zh": "a", "en": "a"}
    with pytest.raises(ConfigError, match="has no option 'model_nmae'") as raised:
        build("preprocessor", "SelfCognitionProcessor", {**options, "model_nmae": "c"})
    assert raised.value.hint == "did you mean 'model_name'?"
    with pytest.raises(ConfigError, match="needs the option 'model_author'"):
        build("preprocessor", "SelfCognitionProcessor", {"model_name": "a"})
    with pytest.raises(ConfigError, match="is built already, and takes no options"):
        build("preprocessor", TextProcessor(), {"column": "a"})


def upper(row, column="text"):
    return {"text": row[column].upper()}


def test_a_function_is_bound_to_its_options():
    assert build("preprocessor", upper, {"column": "a"})({"a": "b"}) == {"text": "B"}
    assert build("preprocessor", upper, {}) is upper
    with pytest.raises(ConfigError, match="preprocessor upper has no option 'colum'"):
        build("preprocessor", upper, {"colum": "a"})


def test_bases_are_public_and_abstract():
    for base in (Filter, Preprocessor):
        with pytest.raises(TypeError, match="abstract"):
            base()


def test_looking_up_data_plug_ins_imports_no_torch():
    code = (
        "import sys; from megatrain.config.plugins import resolve;"
        "[resolve(k, n) for k, n in [('preprocessor', 'TextProcessor'), ('filter', 'EmptyFilter'),"
        " ('processor', 'InputProcessor'), ('template', 'Template')]];"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_script_builds_any_kind_by_name(file):
    reward = megatrain.build("reward", "GSM8KAccuracyReward")
    assert isinstance(reward, megatrain.Reward)
    advantage = megatrain.build("advantage", "GRPOAdvantage")
    assert advantage([1.0, 3.0], num_generations=2).tolist() == pytest.approx(
        [-0.7071, 0.7071], abs=1e-3
    )
    metric = megatrain.build("metric", "ThroughputMetric", num_devices=2)
    metric.accumulate([{"length": 8}], seconds=2.0)
    assert metric.calculate()["tokens_per_second_per_device"] == 2.0
    assert megatrain.build("loss", "GRPOLoss", epsilon=0.1).epsilon == 0.1
    short = megatrain.build("filter", f"{file}:Short", trust_remote_code=True, limit=2)
    assert short({"text": "a"})
    assert not short({"text": "ab"})
    with pytest.raises(ConfigError, match="would run a file's code"):
        megatrain.build("filter", f"{file}:Short")
    with pytest.raises(ConfigError, match="has no option 'num_device'"):
        megatrain.build("metric", "ThroughputMetric", num_device=2)
