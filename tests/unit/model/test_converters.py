"""What is said of a distribution that has a converter's name and nothing of it."""

import sys

import pytest

from megatrain.errors import ConfigError
from megatrain.model.converters import find


def test_the_unrelated_package_of_pypi_is_refused_with_an_explanation(tmp_path, monkeypatch):
    """As PyPI's mcore-adapter 0.0.1: its folder is `mcore-adapter`, which nobody can import."""
    info = tmp_path / "mcore_adapter-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mcore-adapter\nVersion: 0.0.1\n")
    (tmp_path / "mcore-adapter").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert "mcore_adapter" not in sys.modules
    with pytest.raises(ConfigError, match=r"0\.0\.1 is installed.*unrelated to ROLL"):
        find("mcore_adapter.models", "mcore-adapter", wanted=("AutoModel",))
