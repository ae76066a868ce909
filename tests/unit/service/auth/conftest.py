"""A store without rows, and services with limits."""

from pathlib import Path
from typing import Any

import pytest

from megatrain.config.service import Limits, ServedModel, ServiceConfig


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a database that is not there yet."""
    return f"sqlite:///{tmp_path / 'service.db'}"


def config(*, keys: bool = True, **limits: Any) -> ServiceConfig:
    """Return a service's configuration."""
    model = ServedModel(name="base", path="/nowhere")
    return ServiceConfig(models=(model,), keys=keys, limits=Limits(**limits))
