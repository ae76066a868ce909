"""Mode 'ray': groups of ranks on a cluster of two nodes, numbers, a lost rank, and the end."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest

import megatrain
from megatrain.api.session import current_remote
from megatrain.bus.driver import Driver
from megatrain.bus.ray.cluster import import_ray
from megatrain.bus.ray.places import Place, variables
from megatrain.bus.ray.plan import count_cpus, make_plans, resolve
from megatrain.config.device_group import DeviceGroup
from megatrain.errors import ConfigError, LayoutError, PlatformError
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import ray_tasks
from tests.multiprocess.data import random_batch

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

BATCHES = [random_batch(4, seed=seed) for seed in range(3)]
MESH = DeviceMesh(tp=2)
OBJECT_STORE = 100 << 20
START_S = 200.0
"""Seconds for ranks to start on a busy machine."""

Drivers = dict[str, Driver]


@pytest.fixture(scope="module")
def local(ranks, checkpoints) -> dict[str, Any]:
    """Return what the steps give in mode 'local'."""
    return ranks.run(ray_tasks.train, MESH, checkpoints("qwen3"), BATCHES)[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this host: one core beside the driver, two on the other."""
    ray = import_ray()
    from ray.cluster_utils import Cluster

    options = {"object_store_memory": OBJECT_STORE, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **options})
    try:
        nodes.add_node(num_cpus=2, **options)
        ray.init(address=nodes.address, log_to_driver=False)
        yield ray
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def drivers(local, cluster) -> Iterator[Drivers]:
    """Two groups: ranks of one on both nodes, of the other beyond the driver's."""
    groups = [
        DeviceGroup("model", 2, device_type="cpu", strategy="STRICT_SPREAD"),
        DeviceGroup("other", [2], device_type="cpu"),
    ]
    megatrain.initialize(
        mode="ray", groups=groups, global_device_mesh=MESH, connect_timeout_s=START_S
    )
    remote = current_remote()
    assert remote is not None
    yield remote.drivers
    megatrain.shutdown()


@pytest.fixture(scope="module")
def train(checkpoints) -> Callable[..., dict[str, Any]]:
    return partial(ray_tasks.train, checkpoints("qwen3"), BATCHES)


def assert_same(report: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(report["losses"], expected["losses"])
    close(report["norms"], expected["norms"])
    for ours, theirs in zip(report["logps"], expected["logps"], strict=True):
        close(ours, theirs)
    assert report["adapter"].keys() == expected["adapter"].keys()
    for name, tensor in expected["adapter"].items():
        close(report["adapter"][name], tensor)


def rank_processes() -> list[int]:
    """Return the ids of all ranks on this host that a driver has started."""
    each = psutil.process_iter(["pid", "cmdline"])
    return [process.pid for process in each if "megatrain.bus" in (process.info["cmdline"] or [])]


def test_numbers_are_those_of_mode_local(drivers, train, local):
    assert_same(train(remote_group="model"), local, 1e-6)


def test_every_group_has_models_of_its_own(drivers, train, local):
    here, there = drivers["model"], drivers["other"]
    assert there.mesh == DeviceMesh()
    assert not set(here.welcome.pids) & set(there.welcome.pids)
    # One rank adds up in another order than two.
    assert_same(train(remote_group="other"), local, 1e-4)


def test_ranks_have_torchruns_variables_of_their_node(drivers):
    found = [psutil.Process(pid).environ() for pid in drivers["model"].welcome.pids]
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [[each[name] for name in names] for each in found] == [
        ["0", "2", "0", "1"],
        ["1", "2", "0", "1"],
    ]
    assert found[0]["MASTER_ADDR"] == found[1]["MASTER_ADDR"] != ""
    assert found[0]["MASTER_PORT"] == found[1]["MASTER_PORT"]


def test_a_killed_rank_changes_nothing(drivers, train, local):
    driver = drivers["model"]
    lost = driver.welcome.pids[1]
    report = train(lambda: os.kill(lost, signal.SIGKILL), remote_group="model")
    assert (
        f"rank 1 (node {import_ray().util.get_node_ip_address()}, pid {lost}) was killed by "
        in (driver.losses[-1])
    )
    assert driver.welcome.pids[1] != lost
    assert_same(report, local, 1e-6)


def test_a_cluster_without_room_says_what_it_has(drivers):
    from megatrain.bus.ray.groups import start_groups

    groups = [DeviceGroup("more", 1, device_type="cuda")]
    with pytest.raises(PlatformError, match=r"no room for group 'more' .*has 3 CPU in all"):
        start_groups(
            groups,
            drivers["model"].config.model_copy(update={"connect_timeout_s": 1.0}),
            mesh=None,
            seed=1,
            platform="auto",
            timeout_s=10.0,
        )


def test_shutdown_ends_the_ranks_and_leaves_the_scripts_cluster(drivers, cluster):
    """The last one to use the drivers."""
    pids = [*drivers["model"].welcome.pids, *drivers["other"].welcome.pids]
    assert set(pids) <= set(rank_processes())
    megatrain.shutdown()
    assert not set(pids) & set(rank_processes())
    assert cluster.is_initialized()


@pytest.mark.slow
def test_a_cluster_that_was_started_ends_with_its_ranks(checkpoints, tmp_path):
    ray = import_ray()
    if ray.is_initialized():
        ray.shutdown()
    megatrain.initialize(
        mode="ray",
        groups=DeviceGroup("model", 2, device_type="cpu"),
        global_device_mesh=MESH,
        journal=tmp_path / "journal",
        connect_timeout_s=START_S,
    )
    try:
        remote = current_remote()
        assert remote is not None
        pids = remote.driver(None).welcome.pids
        environments = [psutil.Process(pid).environ() for pid in pids]
        assert [each["LOCAL_RANK"] for each in environments] == ["0", "1"]
        assert (tmp_path / "journal/model").is_dir()
        os.kill(psutil.Process(pids[0]).ppid(), signal.SIGKILL)  # its actor
        assert remote.driver(None).ping() > 0
        assert "rank 0" in remote.driver(None).losses[-1]
        assert "gone with its actor" in remote.driver(None).losses[-1]
    finally:
        megatrain.shutdown()
    assert not ray.is_initialized()
    assert not rank_processes()


def test_ranks_of_a_node_see_the_devices_of_all_of_them():
    def place(node: str, device: str) -> Place:
        return Place(node, node, "", (1, 2), {"GPU": [device]})

    found = variables([place("a", "5"), place("a", "3"), place("b", "7")], "GPU")
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    assert [[each[name] for name in names] for each in found] == [
        ["0", "2", "a", "5,3"],
        ["1", "2", "a", "5,3"],
        ["0", "1", "a", "7"],
    ]


def test_groups_that_share_devices_take_equal_parts_of_them():
    groups = [DeviceGroup("a", 3, device_type="GPU")]
    groups += [DeviceGroup(name, 2, device_type="GPU", share_with="a") for name in "bc"]
    plans = make_plans(groups, None, "auto")
    assert [(plan.owner, plan.device, plan.share) for plan in plans] == [("a", "GPU", 0.3333)] * 3
    assert [plan.mesh for plan in plans] == [DeviceMesh(dp=ranks) for ranks in (3, 2, 2)]
    assert count_cpus(plans) == 9


@pytest.mark.parametrize(("has", "platform"), [("GPU", "cuda"), ("NPU", "npu"), ("TPU", "cpu")])
def test_auto_is_the_fastest_that_the_cluster_has(has, platform):
    plans = resolve(make_plans(None, MESH, "auto"), {"CPU": 4.0, has: 2.0})
    assert [(plan.group.name, plan.mesh, plan.platform) for plan in plans] == [
        ("model", MESH, platform)
    ]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"name": "a b"}, ConfigError, "letters, digits"),
        ({"ranks": 0}, ConfigError, "ranks of group 'model' must be a number >= 1"),
        ({"ranks": True}, ConfigError, "ranks of group"),
        ({"ranks": "4"}, ConfigError, "ranks of group"),
        ({"ranks": [0, 0]}, ConfigError, "without repetition"),
        ({"device_type": "tpu"}, ConfigError, "auto, cpu, cuda, npu, gpu: 'tpu'"),
        ({"strategy": "NEAR"}, ConfigError, "PACK, SPREAD"),
        ({"gpus_per_rank": 2}, ConfigError, "at most 1"),
        ({"gpus_per_rank": 0}, ConfigError, "above 0"),
        ({"cpus_per_rank": -1}, ConfigError, "cpus_per_rank"),
        ({"share_with": "model"}, ConfigError, "another group's name"),
        ({"mesh": {"tp": 2}}, ConfigError, "a DeviceMesh"),
        ({"mesh": DeviceMesh(tp=4)}, LayoutError, "world=2"),
    ],
)
def test_a_bad_group_is_refused(options, error, words):
    with pytest.raises(error, match=words):
        DeviceGroup(**{"name": "model", "ranks": 2, **options})


@pytest.mark.parametrize(
    ("groups", "options", "words"),
    [
        ([], {}, "a list of DeviceGroup"),
        ("model", {}, "a list of DeviceGroup"),
        ([DeviceGroup("a", 1), DeviceGroup("a", 1)], {}, "a name of its own: a"),
        ([DeviceGroup("a", 2), DeviceGroup("b", 2)], {"global_device_mesh": MESH}, "'model'"),
        ([DeviceGroup("a", 4)], {"global_device_mesh": MESH}, "world=4"),
        (
            [DeviceGroup("a", 2, mesh=DeviceMesh(dp=2))],
            {"global_device_mesh": MESH},
            "two meshes",
        ),
        ([DeviceGroup("a", [0, 1]), DeviceGroup("b", [1])], {}, "both name device 1"),
        ([DeviceGroup("a", 1, share_with="b")], {}, "which is no group"),
        ([DeviceGroup("a", 1), DeviceGroup("b", 2, share_with="a")], {}, "as many ranks at most"),
        (
            [
                DeviceGroup("a", 1, gpus_per_rank=0.7),
                DeviceGroup("b", 1, gpus_per_rank=0.7, share_with="a"),
            ],
            {},
            "one device together",
        ),
        ([DeviceGroup("a", 1, device_type="cuda")], {"platform": "cpu"}, "platform='cpu'"),
        ([DeviceGroup("a", 1)], {"fork_ranks": True}, "fork_ranks"),
    ],
)
def test_groups_that_cannot_work_are_refused_before_ray_is_asked(groups, options, words):
    with pytest.raises(ConfigError, match=words):
        megatrain.initialize(mode="ray", groups=groups, **options)


def test_without_ray_the_way_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlatformError, match=r"pip install 'megatrain\[ray\]'"):
        megatrain.initialize(mode="ray", groups=[DeviceGroup("model", 1)])
