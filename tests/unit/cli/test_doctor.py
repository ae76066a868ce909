"""The doctor's report: its verdict, its two forms, and how it takes a broken torch."""

import argparse
import json

import pytest

from megatrain.cli import doctor
from megatrain.platforms.nvidia import Gpu

TORCH = {"built_for_cuda": "13.0", "cuda_is_available": True, "nccl": "2.27.7", "gloo": True}


@pytest.fixture
def torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_torch", lambda: dict(TORCH))


def _parse(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return parser.parse_args(["doctor", *options])


@pytest.mark.usefixtures("torch_answers")
def test_json_is_one_object_with_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    args = _parse("--json")
    assert args.run(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert {"python", "machine", "devices", "torch", "packages", "notes"} <= report.keys()


@pytest.mark.usefixtures("torch_answers")
def test_the_table_names_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(_parse()) == 0
    printed = capsys.readouterr().out
    for name in ("megatron-core", "megatron-bridge", "apex", "vllm", "verdict"):
        assert name in printed


def test_a_torch_that_does_not_import_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "TORCH_QUESTION", "raise ImportError('libcudart')")
    assert doctor.run(_parse()) == 1
    assert "ImportError: libcudart" in capsys.readouterr().out


def test_plain_text_says_the_same_when_rich_is_missing(torch_answers: None) -> None:
    report = doctor.examine()
    text = doctor.plain_text(report)
    assert all(row["name"] in text for row in report["packages"])
    assert text.rstrip().endswith("all that is required is there")


def test_a_b200_with_an_affected_nccl_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    lines = doctor.notes((Gpu(0, "NVIDIA B200", (10, 0), 183359),), TORCH)
    assert lines[0].startswith("NCCL_P2P_DISABLE=1 (will be set)")


def test_the_interface_that_ranks_talk_over_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert "GLOO_SOCKET_IFNAME=lo (will be set)" in doctor.notes((), TORCH)[-1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert doctor.notes((), TORCH)[-1] == "GLOO_SOCKET_IFNAME=eth7 (you have set it)"


def test_a_gpu_that_torch_cannot_use_is_noted() -> None:
    gpu = Gpu(0, "NVIDIA RTX PRO 6000", (12, 0), 97887)
    lines = doctor.notes((gpu,), {**TORCH, "cuda_is_available": False})
    assert any("torch cannot use the GPU" in line for line in lines)
