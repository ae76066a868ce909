"""Layout arithmetic: sizes, what they multiply to, and the messages when they do not fit."""

import dataclasses
import itertools

import pytest

from megatrain.errors import ConfigError, LayoutError
from megatrain.parallel.layout import DeviceMesh

SIZES = (1, 2, 4)


def test_a_mesh_of_ones_is_one_rank() -> None:
    mesh = DeviceMesh()
    assert (mesh.world_size, mesh.expert_dp, mesh.describe()) == (1, 1, "1")


@pytest.mark.parametrize(("dp", "tp", "pp", "cp"), list(itertools.product(SIZES, repeat=4)))
def test_the_world_is_the_product_and_ep_does_not_multiply_it(
    dp: int, tp: int, pp: int, cp: int
) -> None:
    ep = dp * tp * cp
    mesh = DeviceMesh(dp=dp, tp=tp, pp=pp, cp=cp, ep=ep)
    assert mesh.world_size == dp * tp * pp * cp
    assert mesh.expert_dp == 1
    assert DeviceMesh(dp=dp, tp=tp, pp=pp, cp=cp).expert_dp == ep


def test_dp_is_what_is_left_of_the_world() -> None:
    mesh = DeviceMesh.from_sizes(tp_size=2, pp_size=2, world_size=8)
    assert mesh == DeviceMesh(dp=2, tp=2, pp=2)
    assert DeviceMesh.from_sizes(tp_size=2).dp == 1


def test_a_mesh_names_its_axes_larger_than_one() -> None:
    assert DeviceMesh(tp=2, pp=2, ep=2).describe() == "tp2·pp2·ep2"


def test_a_report_has_every_axis() -> None:
    mesh = DeviceMesh(dp=2, tp=4)
    assert DeviceMesh(**mesh.to_dict()) == mesh
    assert set(mesh.to_dict()) == {field.name for field in dataclasses.fields(mesh)}


@pytest.mark.parametrize("size", [0, -1, 1.0, "2", None, True])
@pytest.mark.parametrize("axis", ["dp", "tp", "pp", "cp", "ep", "etp", "vpp", "fsdp"])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(axis: str, size: object) -> None:
    with pytest.raises(LayoutError, match=f"{axis}="):
        DeviceMesh(**{axis: size})  # type: ignore[arg-type]


def test_experts_must_divide_the_ranks_of_a_stage() -> None:
    with pytest.raises(LayoutError, match=r"ep \* etp must divide dp \* cp \* tp: ep=3") as error:
        DeviceMesh(dp=2, tp=2, ep=3)
    assert error.value.hint == "choose ep * etp among the divisors of 4"
    with pytest.raises(LayoutError):
        DeviceMesh(tp=2, ep=2, etp=2)


def test_interleaving_needs_stages() -> None:
    with pytest.raises(LayoutError, match="vpp=2, pp=1"):
        DeviceMesh(vpp=2)
    assert DeviceMesh(vpp=2, pp=2).world_size == 2


@pytest.mark.parametrize("world_size", [1, 3, 6])
def test_a_world_that_is_no_multiple_is_refused_with_all_values(world_size: int) -> None:
    with pytest.raises(LayoutError, match=rf"world={world_size}, tp=4, pp=1, cp=1 \(product 4\)"):
        DeviceMesh.from_sizes(tp_size=4, world_size=world_size)


def test_a_world_that_differs_from_the_product_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"world=8, dp=2.*\(product 4\)") as error:
        DeviceMesh.from_sizes(dp_size=2, tp_size=2, world_size=8)
    assert error.value.hint == "start 4 ranks, or change the mesh"


def test_a_zero_size_is_a_layout_error_even_when_dp_is_left_open() -> None:
    with pytest.raises(ConfigError):
        DeviceMesh.from_sizes(tp_size=0, world_size=2)


def test_fsdp_ranks_are_data_parallel_ranks() -> None:
    mesh = DeviceMesh.from_sizes(fsdp_size=4, dp_size=2, tp_size=2)
    assert mesh == DeviceMesh(dp=8, fsdp=4, tp=2)
    assert (mesh.world_size, mesh.describe()) == (16, "dp8·tp2·fsdp4")
    assert DeviceMesh.from_sizes(fsdp_size=4) == DeviceMesh(dp=4, fsdp=4)


def test_the_replicas_of_the_fsdp_ranks_are_what_is_left_of_the_world() -> None:
    mesh = DeviceMesh.from_sizes(fsdp_size=2, tp_size=2, world_size=8)
    assert mesh == DeviceMesh(dp=4, fsdp=2, tp=2)
    message = r"tp \* pp \* cp \* fsdp: world=6, tp=2, pp=1, cp=1, fsdp=2 \(product 4\)"
    with pytest.raises(LayoutError, match=message):
        DeviceMesh.from_sizes(fsdp_size=2, tp_size=2, world_size=6)


def test_fsdp_must_divide_the_data_parallel_ranks() -> None:
    with pytest.raises(LayoutError, match="fsdp must divide dp: fsdp=4, dp=2"):
        DeviceMesh(dp=2, fsdp=4)


def test_experts_are_not_spread_over_fsdp_ranks() -> None:
    with pytest.raises(LayoutError, match="fsdp=2, ep=2, etp=1, tp=1, cp=1") as error:
        DeviceMesh.from_sizes(fsdp_size=2, ep_size=2)
    assert error.value.hint == "choose ep * etp among the divisors of 1, or fsdp=1"
    assert DeviceMesh.from_sizes(fsdp_size=2, tp_size=2, ep_size=2).expert_dp == 2
