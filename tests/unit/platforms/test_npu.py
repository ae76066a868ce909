"""The npu platform's decisions; nothing here has met an NPU."""

import logging

import pytest

from megatrain.errors import PlatformError
from megatrain.platforms import npu


def test_without_torch_npu_the_platform_is_absent_and_says_what_is_missing() -> None:
    if npu.is_installed("torch_npu"):
        pytest.skip("torch_npu is installed here")
    platform = npu.NpuPlatform()
    assert not platform.is_available()
    for call in (platform.patches, lambda: platform.device(0)):
        with pytest.raises(PlatformError, match="needs torch_npu"):
            call()


def test_mindspeed_is_optional_and_its_absence_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatrain"), "propagate", True)
    npu.check_installed(lambda module: module == "torch_npu")
    assert "MindSpeed is not installed" in caplog.text


@pytest.mark.parametrize(
    ("has_mindspeed", "name"), [(True, "npu.mindspeed"), (False, "npu.transfer")]
)
def test_one_redirection_is_chosen_and_has_a_reason(has_mindspeed: bool, name: str) -> None:
    (patch,) = npu.redirections(has_mindspeed=has_mindspeed)
    assert patch.name == name
    assert patch.reason


@pytest.mark.parametrize("local_rank", [-1, 8])
def test_a_rank_without_an_npu_of_its_own_is_refused(local_rank: int) -> None:
    with pytest.raises(PlatformError, match=rf"local rank {local_rank}, 8 NPU"):
        npu.check_device(local_rank, 8)


def test_a_timeout_that_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HCCL_CONNECT_TIMEOUT", raising=False)
    assert npu.NpuPlatform().environment() == {"HCCL_CONNECT_TIMEOUT": "1200"}
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    assert npu.NpuPlatform().environment() == {}
