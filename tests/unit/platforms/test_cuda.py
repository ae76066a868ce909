"""The cuda platform: what it refuses, what it leaves to the user, and that it patches nothing."""

import logging

import pytest

from megatrain.errors import PlatformError
from megatrain.platforms import cuda, nvidia

B200 = nvidia.Gpu(0, "NVIDIA B200", (10, 0), 183359)


@pytest.fixture
def b200_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks on a host whose driver and NCCL are as in the reports."""
    monkeypatch.setattr(cuda, "_gpus", lambda: (B200,))
    monkeypatch.setattr(cuda, "nccl_version", lambda: (2, 27, 7))
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)


def test_nothing_is_ever_patched_on_a_gpu() -> None:
    assert cuda.CudaPlatform().patches() == ()


@pytest.mark.usefixtures("b200_host")
def test_on_b200_p2p_is_switched_off_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("megatrain"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="megatrain"):
        assert cuda.CudaPlatform().environment() == {"NCCL_P2P_DISABLE": "1"}
    assert "NCCL_P2P_DISABLE=1: B200 with NCCL 2.27.7" in caplog.text


@pytest.mark.usefixtures("b200_host")
def test_what_the_user_has_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert cuda.CudaPlatform().environment() == {}


def test_a_rank_without_a_gpu_of_its_own_is_refused_with_both_numbers() -> None:
    with pytest.raises(PlatformError, match=r"local rank 4, 4 GPU\(s\)") as error:
        cuda.check_device(4, 4, has_nccl=True)
    assert error.value.hint == "start at most 4 rank(s) on this host"
    cuda.check_device(3, 4, has_nccl=True)


def test_a_machine_without_a_gpu_is_told_the_way_out() -> None:
    with pytest.raises(PlatformError, match="found 0") as error:
        cuda.check_device(0, 0, has_nccl=True)
    assert "megatrain doctor" in (error.value.hint or "")


def test_a_torch_without_nccl_is_refused() -> None:
    with pytest.raises(PlatformError, match="NCCL"):
        cuda.check_device(0, 1, has_nccl=False)
