"""Ranks on two hosts under torchrun: training works, a pulled cable is named and survived."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fixtures.two_hosts import NET, TwoHosts, are_possible

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(not are_possible(), reason="network namespaces need root and iproute2"),
]
SCRIPT = Path(__file__).parents[1] / "fixtures" / "two_hosts_script.py"
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
MEGATRAIN = str(Path(sys.executable).with_name("megatrain"))


def rendezvous(kind: str, number: int) -> list[str]:
    """Return torchrun's options of a host."""
    if kind == "static":
        return ["--node-rank", str(number), "--master-addr", f"{NET}.1", "--master-port", "29400"]
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NET}.1:29400", "--rdzv-id", "test",
            "--local-addr", f"{NET}.{number + 1}"]  # fmt: skip


def start_ranks(hosts: TwoHosts, kind: str, folder: Path) -> str:
    """Start a rank of TP2 on each host; return where rank 0 listens."""
    (folder / "token").write_text("a secret of two hosts\n")
    (folder / "token").chmod(0o600)
    address = f"tcp://{NET}.1:29500"
    for number, host in enumerate("ab"):
        command = [TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3"]
        command += [*rendezvous(kind, number), "--no-python", MEGATRAIN, "worker"]
        command += ["--listen", address, "--tp", "2", "--token-file", str(folder / "token")]
        hosts.start(host, command, folder / f"{host}.log", OMP_NUM_THREADS="1")
    return address


def drive(hosts: TwoHosts, address: str, base: Path, folder: Path, *more: str) -> dict:
    command = [sys.executable, str(SCRIPT), address, str(base), str(folder), *more]
    try:
        return json.loads(hosts.run("a", command, 280).splitlines()[-1])
    except Exception as error:
        logs = [(folder / f"{host}.log").read_text()[-3000:] for host in "ab"]
        raise AssertionError("\n".join([str(error), *logs])) from error


@pytest.fixture(scope="module")
def expected(checkpoints, tmp_path_factory):
    """The losses of a run without any trouble, over c10d."""
    folder = tmp_path_factory.mktemp("c10d")
    with TwoHosts("mtc") as hosts:
        report = drive(hosts, start_ranks(hosts, "c10d", folder), checkpoints("qwen3"), folder)
    assert report["lost"] == []
    assert report["hosts"] == ["host-a", "host-b"]
    assert report["losses"][-1] < report["losses"][0]
    return report["losses"]


@pytest.mark.timeout(600)
def test_a_static_rendezvous_gives_the_same(expected, checkpoints, tmp_path):
    with TwoHosts("mts") as hosts:
        report = drive(
            hosts, start_ranks(hosts, "static", tmp_path), checkpoints("qwen3"), tmp_path
        )
    assert report["losses"] == expected


@pytest.mark.timeout(600)
def test_a_pulled_cable_names_the_host_and_plugged_in_again_training_goes_on(
    expected, checkpoints, tmp_path
):
    with TwoHosts("mtp") as hosts:
        address = start_ranks(hosts, "c10d", tmp_path)

        def pull_and_plug() -> None:
            while not (tmp_path / "pull").exists():
                time.sleep(0.05)
            hosts.cable("down")
            (tmp_path / "pulled").touch()
            time.sleep(8)
            hosts.cable("up")

        threading.Thread(target=pull_and_plug, daemon=True).start()
        report = drive(hosts, address, checkpoints("qwen3"), tmp_path, "pull")
    assert report["losses"] == expected
    assert len(report["lost"]) == 1
    assert "rank 1 (host host-b" in report["lost"][0]
    assert "no sign of life" in report["lost"][0]
