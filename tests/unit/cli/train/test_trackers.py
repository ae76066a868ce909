"""Trackers and hubs, with packages that only write down their calls."""

import importlib
import sys
import types

import pytest

from megatrain.cli.train import hub, trackers
from megatrain.config.run.sections import ReportSection
from megatrain.errors import ConfigError, ExportError


def test_a_tracker_without_its_package_is_refused_with_the_command_that_installs_it():
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"wandb is not installed\nhint: pip install wandb"):
        trackers.check_trackers(["tensorboard", "wandb"])


def test_tensorboard_gets_every_metric(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = trackers.TensorBoard(
        project="p", run_name="r", folder=tmp_path, config={"train.batch_size": 8}
    )
    tracker.log({"loss": 2.0, "eval_rewards/margins": 0.5}, 3)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "r"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.0)]
    assert events.Scalars("eval_rewards/margins")[0].value == 0.5


class Recorder(types.ModuleType):
    """A package whose every function, and whatever that returns, writes down its call."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "starts", "sends", "ends"),
    [
        ("wandb", "init", "log", "finish"),
        ("mlflow", "start_run", "log_metrics", "end_run"),
        ("swanlab", "init", "log", "finish"),
    ],
)
def test_trackers_are_started_fed_and_closed(name, starts, sends, ends, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, Recorder(name, calls))
    tracker = trackers.TRACKERS[name](
        project="mine", run_name="first", folder=tmp_path, config={"recipe": "sft"}
    )
    tracker.log({"loss": 2.0}, 3)
    tracker.close()
    assert [call[0] for call in calls if call[0] in (starts, sends, ends)] == [starts, sends, ends]
    assert (sends, ({"loss": 2.0},), {"step": 3}) in calls
    text = repr(calls)
    assert "mine" in text
    assert "first" in text
    assert "{'recipe': 'sft'}" in text


def test_nested_options_become_dotted_names():
    assert trackers.flatten({"train": {"lr": 1, "betas": [0.9]}, "recipe": "sft"}) == {
        "train.lr": 1,
        "train.betas": "[0.9]",
        "recipe": "sft",
    }


def test_a_push_that_cannot_work_is_refused_before_training(monkeypatch):
    from huggingface_hub import constants

    hub.check_hub(ReportSection())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="needs the network"):
        hub.check_hub(ReportSection(push_to_hub="owner/name"))
    with pytest.raises(ConfigError, match="owner/name of a repository"):
        hub.check_hub(ReportSection(push_to_hub="name"))
    with pytest.raises(ConfigError, match="pip install modelscope"):
        hub.check_hub(ReportSection(push_to_hub="owner/name", hub="modelscope"))


def test_a_push_sends_the_model_without_the_optimizer(tmp_path, monkeypatch):
    import huggingface_hub

    calls: list = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Recorder("api", calls))
    hub.push(tmp_path, ReportSection(push_to_hub="owner/name", hub_private=False))
    created, uploaded = calls
    assert created == ("create_repo", ("owner/name",), {"private": False, "exist_ok": True})
    assert uploaded[2]["folder_path"] == tmp_path
    assert uploaded[2]["ignore_patterns"] == ["state/*"]


def test_a_push_that_fails_says_that_the_folder_is_complete(tmp_path, monkeypatch):
    import huggingface_hub

    class Unreachable:
        def create_repo(self, *args, **options):
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(
        ExportError, match=r"is complete, and huggingface did not take it.*no route"
    ):
        hub.push(tmp_path, ReportSection(push_to_hub="owner/name"))


MODELSCOPE = """
CALLS = []
COOKIES = []

class ModelScopeConfig:
    @staticmethod
    def get_cookies():
        return COOKIES[0] if COOKIES else None

class HubApi:
    def __getattr__(self, name):
        return lambda *args, **options: CALLS.append((name, args, options))
"""


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """A package of this name that only writes down its calls."""
    package = tmp_path / "site" / "modelscope"
    (package / "hub").mkdir(parents=True)
    for folder in (package, package / "hub"):
        (folder / "__init__.py").write_text("")
    (package / "hub" / "api.py").write_text(MODELSCOPE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    yield importlib.import_module("modelscope.hub.api")
    for name in [each for each in sys.modules if each.partition(".")[0] == "modelscope"]:
        del sys.modules[name]


def test_a_push_to_modelscope_needs_a_login_before_training(modelscope, monkeypatch):
    report = ReportSection(push_to_hub="owner/name", hub="modelscope")
    with pytest.raises(ConfigError, match="login at ModelScope") as caught:
        hub.check_hub(report)
    assert "MODELSCOPE_API_TOKEN" in caught.value.hint
    modelscope.COOKIES.append({"m_session_id": "x"})
    hub.check_hub(report)
    modelscope.COOKIES.clear()
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "x")
    hub.check_hub(report)


@pytest.mark.parametrize(("private", "visibility"), [(True, "private"), (False, "public")])
def test_a_push_to_modelscope_sends_the_model_without_the_optimizer(
    private, visibility, modelscope, tmp_path
):
    report = ReportSection(push_to_hub="owner/name", hub="modelscope", hub_private=private)
    assert hub.push(tmp_path, report) == "ms://owner/name"
    login, created, uploaded = modelscope.CALLS
    assert login[0] == "login"
    assert created == ("create_repo", ("owner/name",), {"visibility": visibility, "exist_ok": True})
    assert uploaded[0] == "upload_folder"
    assert uploaded[2]["repo_id"] == "owner/name"
    assert uploaded[2]["folder_path"] == str(tmp_path)
    assert uploaded[2]["ignore_patterns"] == ["state/*"]
