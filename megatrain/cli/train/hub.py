"""Pushing what was trained to a repository on the Hugging Face or ModelScope hub."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatrain.config.run.sections import ReportSection
from megatrain.errors import ConfigError, ExportError

PACKAGES: Mapping[str, str] = {"huggingface": "huggingface_hub", "modelscope": "modelscope"}
MODELSCOPE_TOKEN = "MODELSCOPE_API_TOKEN"
LOGIN: Mapping[str, str] = {"huggingface": "hf auth login", "modelscope": "modelscope login"}


def check_hub(report: ReportSection) -> None:
    """Raise ConfigError, before a run has cost anything, if its result could not be pushed."""
    if report.push_to_hub is None:
        return
    package = PACKAGES[report.hub]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"report.push_to_hub needs the package {package}", hint=f"pip install {package}"
        )
    if report.push_to_hub.count("/") != 1:
        raise ConfigError(
            f"report.push_to_hub must be owner/name of a repository: {report.push_to_hub!r}"
        )
    if report.hub == "huggingface":
        _check_hugging_face()
    else:
        _check_modelscope()


def _check_hugging_face() -> None:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            "report.push_to_hub needs the network: HF_HUB_OFFLINE is set",
            hint="unset it, or push later with `hf upload`",
        )
    if get_token() is None:
        raise ConfigError(
            "report.push_to_hub needs a token of the Hugging Face hub",
            hint=f"{LOGIN['huggingface']}, or set HF_TOKEN",
        )


def _check_modelscope() -> None:
    config: Any = importlib.import_module("modelscope.hub.api").ModelScopeConfig
    if not os.environ.get(MODELSCOPE_TOKEN) and config.get_cookies() is None:
        raise ConfigError(
            "report.push_to_hub needs a login at ModelScope, not older than 30 days",
            hint=f"{LOGIN['modelscope']}, or set {MODELSCOPE_TOKEN}",
        )


def push(folder: Path, report: ReportSection) -> str:
    """Upload a folder; return where it is.

    Raises ExportError if the hub does not take it; the folder is as it was.
    """
    assert report.push_to_hub is not None
    try:
        return _UPLOADS[report.hub](folder, report.push_to_hub, report.hub_private)
    except Exception as error:  # clients raise errors of several HTTP libraries
        raise ExportError(
            f"{folder} is complete, and {report.hub} did not take it: "
            f"{type(error).__name__}: {error}",
            hint=f"see to the network and `{LOGIN[report.hub]}`, then upload the folder",
        ) from error


def _to_hugging_face(folder: Path, repository: str, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=url.repo_id,
        folder_path=folder,
        commit_message=_MESSAGE,
        ignore_patterns=list(_NOT_PUSHED),
    )
    return str(url)


def _to_modelscope(folder: Path, repository: str, private: bool) -> str:
    api: Any = importlib.import_module("modelscope.hub.api").HubApi()
    api.login()  # with the token of the environment; without one, the login of before holds
    visibility = "private" if private else "public"
    api.create_repo(repository, visibility=visibility, exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        commit_message=_MESSAGE,
        ignore_patterns=list(_NOT_PUSHED),
    )
    return f"ms://{repository}"


_MESSAGE = "Trained with megatrain"
_NOT_PUSHED = ("state/*",)
"""Optimizer and counters: for resuming here, not for using the model."""
_UPLOADS: Mapping[str, Callable[[Path, str, bool], str]] = {
    "huggingface": _to_hugging_face,
    "modelscope": _to_modelscope,
}
