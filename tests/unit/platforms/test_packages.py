"""What is reported for a package that is there, missing, wrong, broken, or somebody else's."""

import pytest

from megatrain.platforms import packages
from megatrain.platforms.packages import Distribution, Status

ALL = frozenset({"cpu", "cuda", "npu"})
CPU = frozenset({"cpu"})
FLASH = next(package for package in packages.OPTIONALS if package.name == "flash-attn")

NVIDIA_APEX = Distribution("0.1", "PyTorch Extensions written by NVIDIA")
WEB_APEX = Distribution("0.9.10.dev0", "Pyramid toolkit to add Velruse", ("apex/models.py",))


def test_only_exact_versions_of_our_own_dependencies_are_pins() -> None:
    lines = ["torch==2.13.0", "Megatron_Core == 0.19.2 ; x", "a>=1", "ray==2.0; extra == 'ray'"]
    assert packages.pins(lines) == {"torch": "2.13.0", "megatron-core": "0.19.2"}


def test_the_project_declares_every_package_that_the_engine_is_made_of() -> None:
    engine = {"torch", "megatron-core", "megatron-bridge", "transformers", "peft", "safetensors"}
    assert engine <= packages.project_pins().keys()


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu130", "2.13.0+cpu"])
def test_a_local_label_does_not_make_a_version_wrong(version: str) -> None:
    assert packages.check_pin("torch", "2.13.0", Distribution(version)).status is Status.OK


def test_a_wrong_version_is_fatal_and_comes_with_the_command() -> None:
    finding = packages.check_pin("peft", "0.21.2", Distribution("0.20.0"))
    assert finding.fatal
    assert finding.mend == "uv sync, or: pip install peft==0.21.2"


def test_a_missing_requirement_is_fatal_and_bridge_comes_without_its_dependencies() -> None:
    finding = packages.check_pin("megatron-bridge", "0.6.2", None)
    assert finding.fatal
    assert "--no-deps megatron-bridge==0.6.2" in finding.mend


@pytest.mark.parametrize(
    ("found", "importable", "devices", "status"),
    [
        (Distribution("2.8"), True, ALL, Status.OK),
        (None, True, ALL, Status.OK),
        (Distribution("2.8"), False, CPU, Status.BROKEN),
        (None, False, ALL, Status.MISSING),
        (None, False, CPU, Status.NOT_NEEDED),
    ],
)
def test_an_optional_package_is_never_fatal(
    found: Distribution | None, importable: bool, devices: frozenset[str], status: Status
) -> None:
    finding = packages.check_optional(FLASH, found, importable=importable, devices=devices)
    assert finding.status is status
    assert not finding.fatal
    assert bool(finding.cost) is (status is not Status.OK)


def test_nvidias_apex_is_told_from_the_unrelated_one_by_what_it_says_and_brings() -> None:
    built = Distribution("0.1", "", ("apex/normalization/fused_layer_norm.py",))
    assert packages.is_nvidia_apex(NVIDIA_APEX, has_kernels=False)
    assert packages.is_nvidia_apex(built, has_kernels=False)
    assert packages.is_nvidia_apex(Distribution("0.1"), has_kernels=True)
    assert not packages.is_nvidia_apex(WEB_APEX, has_kernels=False)


def test_the_unrelated_apex_is_a_warning_with_the_way_out() -> None:
    finding = packages.check_apex(WEB_APEX, has_kernels=False, devices=CPU)
    assert finding.status is Status.UNRELATED
    assert finding.mend == "pip uninstall apex"
    assert not finding.fatal


def test_nobody_is_told_to_pip_install_apex() -> None:
    finding = packages.check_apex(None, has_kernels=False, devices=ALL)
    assert finding.status is Status.MISSING
    assert "never `pip install apex`" in finding.mend


def test_an_mcore_adapter_from_an_index_is_the_unrelated_one() -> None:
    finding = packages.check_mcore_adapter(Distribution("0.1"))
    assert finding is not None
    assert finding.status is Status.UNRELATED
    assert packages.check_mcore_adapter(Distribution("0.1", from_index=False)) is None
    assert packages.check_mcore_adapter(None) is None


def test_without_the_project_nothing_can_be_compared_and_that_is_fatal() -> None:
    assert packages.check_project(None).fatal


def test_this_environment_is_complete() -> None:
    assert [finding.name for finding in packages.inspect(CPU) if finding.fatal] == []


def test_without_flash_linear_attention_speed_is_all_that_is_lost() -> None:
    package = next(each for each in packages.OPTIONALS if each.module == "fla")
    finding = packages.check_optional(package, None, importable=False, devices=ALL)
    assert finding.status is Status.MISSING
    assert "run in plain torch" in finding.cost
