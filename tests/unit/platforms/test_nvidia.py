"""What follows from the devices and the NCCL of a machine, decided without either."""

import pytest

from megatrain.platforms import nvidia

H100 = nvidia.Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 81559)
B200 = nvidia.Gpu(0, "NVIDIA B200", (10, 0), 183359)
RTX = nvidia.Gpu(0, "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 97887)

SMI = """\
0, NVIDIA H100 80GB HBM3, 9.0, 81559
1, NVIDIA B200, 10.0, [N/A]
No devices were found
"""


def _names(gpu: nvidia.Gpu, nccl: tuple[int, ...], num_ranks: int = 8) -> list[str]:
    return [variable.name for variable in nvidia.variables([gpu], nccl, num_ranks=num_ranks)]


def test_the_answer_of_nvidia_smi_is_read_and_chatter_is_left_out() -> None:
    assert nvidia.parse_gpus(SMI) == (H100, nvidia.Gpu(1, "NVIDIA B200", (10, 0), 0))
    assert nvidia.parse_gpus("") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2.29.7", (2, 29, 7)), ("9.0", (9, 0)), ("[N/A]", ()), ("", ()), ("2.x", (2,))],
)
def test_a_version_is_its_leading_numbers(text: str, expected: tuple[int, ...]) -> None:
    assert nvidia.version_tuple(text) == expected


@pytest.mark.parametrize("nccl", [(2, 26, 0), (2, 26, 5), (2, 27, 7), (2, 29, 2), ()])
def test_p2p_is_switched_off_on_b200_with_an_affected_or_unknown_nccl(
    nccl: tuple[int, ...],
) -> None:
    assert _names(B200, nccl) == ["NCCL_P2P_DISABLE"]


@pytest.mark.parametrize("nccl", [(2, 25, 1), (2, 29, 3), (2, 29, 7), (2, 30, 4)])
def test_p2p_stays_on_b200_with_any_other_nccl(nccl: tuple[int, ...]) -> None:
    assert _names(B200, nccl) == []


@pytest.mark.parametrize("gpu", [H100, RTX])
def test_p2p_stays_on_other_devices(gpu: nvidia.Gpu) -> None:
    assert "NCCL_P2P_DISABLE" not in _names(gpu, (2, 27, 7))


def test_the_reason_names_the_version_and_the_way_back() -> None:
    (variable,) = nvidia.variables([B200], (2, 27, 7), num_ranks=8)
    assert "NCCL 2.27.7" in variable.reason
    assert "to have NVLink back" in variable.reason


def test_kernels_are_queued_in_order_below_blackwell_only() -> None:
    assert _names(H100, (2, 29, 7)) == ["CUDA_DEVICE_MAX_CONNECTIONS"]
    assert _names(RTX, (2, 29, 7)) == []


@pytest.mark.parametrize("gpu", [H100, B200])
def test_one_rank_alone_needs_nothing(gpu: nvidia.Gpu) -> None:
    assert _names(gpu, (2, 27, 7), num_ranks=1) == []
