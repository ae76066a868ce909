"""The deployment files: linted by the tools of their formats, pinned, without secrets, honest.

hadolint, docker-compose, kubernetes-validate and shellcheck come with the development packages and
need neither a daemon nor a cluster nor the network.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE = sorted(DOCKER.glob("compose.*.yaml"))
BATCH = sorted(DOCKER.glob("slurm/*.sbatch"))
SCRIPTS = [*BATCH, *sorted(DOCKER.glob("*.sh"))]
MANIFESTS = sorted(DOCKER.glob("kubernetes/*.yaml"))
FILES = sorted(path for path in DOCKER.rglob("*") if path.is_file() and path.name != "token")
KUBERNETES = "1.37.0"

WORKER = frozenset(
    [
        "--listen",
        "--tp",
        "--pp",
        "--cp",
        "--ep",
        "--etp",
        "--dp",
        "--fsdp",
        "--seed",
        "--platform",
        "--token-file",
        "--certificate",
        "--private-key",
    ]
)
TRAIN = frozenset({"--set", "--dry-run"})
TORCHRUN = frozenset(
    [
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-backend",
        "--rdzv-endpoint",
        "--rdzv-id",
        "--max-restarts",
        "--no-python",
        "--standalone",
        "--local-addr",
    ]
)
BY_OPERATOR = frozenset({"--nnodes", "--nproc-per-node", "--rdzv-endpoint"})
"""What Kubeflow's operator tells torchrun through its environment."""

SECRET = re.compile(
    r"hf_[A-Za-z0-9]{20,}|BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}|\b[0-9a-f]{64}\b"
    r"|(?i:password|secret|token|api_?key)\s*[=:]\s*[\"']?[A-Za-z0-9+]{16,}"
)
IMAGE = re.compile(r"^\S+?(?<!/):(?=[^/]*\d+\.\d+)[A-Za-z0-9._-]+$")

names = {"ids": lambda path: path.name}


def _run(*command: str | Path) -> str:
    """Run a tool of this environment; return what it prints, or fail with it."""
    program = Path(sys.executable).parent / str(command[0])
    found = str(program) if program.is_file() else shutil.which(command[0])
    assert found, f"{command[0]} is not installed: uv sync"
    answer = subprocess.run(
        [found, *map(str, command[1:])], capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def _composed(path: Path) -> dict[str, Any]:
    return json.loads(
        _run("docker-compose", "-f", path, "--profile", "*", "config", "--format", "json")
    )


def _documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def _pods(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every pod template inside a document."""
    if isinstance(value, dict):
        if "containers" in value.get("spec", {}):
            yield value
        for each in value.values():
            yield from _pods(each)
    elif isinstance(value, list):
        for each in value:
            yield from _pods(each)


def _pod_of(path: Path) -> list[dict[str, Any]]:
    return [pod for document in _documents(path) for pod in _pods(document)]


def _job(path: Path, kind: str) -> dict[str, Any]:
    return next(each for each in _documents(path) if each["kind"] == kind)


def _commands() -> dict[str, list[str]]:
    """Return every command line of torchrun's, by where it is."""
    found = {}
    for path in COMPOSE:
        for name, service in _composed(path)["services"].items():
            found[f"{path.name}:{name}"] = service["command"]
    for path in BATCH:
        text = path.read_text().replace("\\\n", " ")
        line = next(line for line in text.splitlines() if line.startswith("srun"))
        found[path.name] = line.partition("torchrun --local-addr")[2].split()
        layout = re.search(r"MEGATRAIN_LAYOUT:-([^}]*)}", text)
        found[path.name] += layout[1].split() if layout else []
    for path in MANIFESTS:
        for pod in _pod_of(path):
            for container in pod["spec"]["containers"]:
                if "command" in container:
                    found[f"{path.name}:{container['name']}"] = container["command"]
    return found


def _options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def test_there_is_a_file_for_every_platform_and_scheduler() -> None:
    assert [path.suffix for path in DOCKERFILES] == [".cpu", ".cuda", ".npu"]
    assert [path.name.split(".")[1] for path in COMPOSE] == ["cpu", "cuda", "npu"]
    assert [path.name for path in BATCH] == ["train.sbatch", "worker.sbatch"]
    assert [path.name for path in MANIFESTS] == ["kuberay.yaml", "pytorchjob.yaml"]


@pytest.mark.parametrize("path", DOCKERFILES, **names)
def test_hadolint_has_nothing_to_say(path: Path) -> None:
    assert _run("hadolint", path) == ""


@pytest.mark.parametrize("path", DOCKERFILES, **names)
def test_an_image_runs_as_a_user_and_copies_only_what_is_sent_to_the_builder(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^USER (.*)$", text, re.M)[-1] == "10001:10001"
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M)
        for word in line.split()[:-1]
    }
    assert copied <= sent
    assert all((ROOT / name).exists() for name in sent)


def test_nvidias_image_keeps_its_own_torch() -> None:
    text = (DOCKER / "Dockerfile.cuda").read_text()
    pattern = re.search(r"grep -vE '([^']*)'", text)
    assert pattern
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not re.search(pattern[1], line)]
    left_out = set(lines) - set(kept)
    assert {line.split("==")[0] for line in left_out} >= {"torch", "triton", "nvidia-nccl-cu13"}
    assert [line for line in kept if re.match(r"torch|triton|nvidia|cuda", line)] == []
    assert "megatron-core" in {line.split("==")[0] for line in kept}
    assert len(left_out) == sum(
        line.startswith(("torch==", "triton==", "nvidia-", "cuda-")) for line in lines
    )


def test_no_file_decides_what_megatrain_decides_by_the_gpus_that_it_finds() -> None:
    assert [path.name for path in FILES if "NCCL_P2P" in path.read_text()] == []


@pytest.mark.parametrize("path", COMPOSE, **names)
def test_docker_compose_accepts_the_file_and_it_has_a_worker_and_a_run(path: Path) -> None:
    project = _composed(path)
    worker, train = project["services"]["worker"], project["services"]["train"]
    assert [port["host_ip"] for port in worker["ports"]] == ["127.0.0.1"]
    assert "ports" not in train
    assert worker["secrets"][0]["target"] in worker["command"]
    assert worker["healthcheck"]["test"]
    assert worker["restart"] == "unless-stopped"
    assert train["profiles"] == ["train"]
    for service in (worker, train):
        assert int(service["shm_size"]) >= 2 << 30
        assert service["cap_drop"] == ["ALL"]
        assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert Path(project["configs"]["train"]["file"]).is_file()


def test_the_health_check_looks_for_the_port_on_which_rank_0_listens(tmp_path: Path) -> None:
    table = "   0: 00000000:733C 00000000:0000 0A 00000000:00000000 00:00000000 00000000 10001\n"
    (tmp_path / "tcp").write_text(table)
    assert int("733C", 16) == 29500
    for path in COMPOSE:
        test = _composed(path)["services"]["worker"]["healthcheck"]["test"]
        assert test[-1] == "/proc/net/tcp"
        _run(*test[1:-1], tmp_path / "tcp")


@pytest.mark.parametrize("path", SCRIPTS, **names)
def test_shellcheck_and_bash_accept_the_script(path: Path) -> None:
    assert _run("shellcheck", "--shell=bash", path) == ""
    _run("bash", "-n", path)


@pytest.mark.parametrize("path", BATCH, **names)
def test_a_batch_job_asks_for_what_several_nodes_and_a_time_limit_need(path: Path) -> None:
    text = path.read_text()
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert int(asked["nodes"]) > 1
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "B:TERM@120"
    assert "requeue" in asked
    assert text.index("#SBATCH") < text.index("set -euo pipefail")  # sbatch reads no further
    assert "GLOO_SOCKET_IFNAME" in text
    assert "LC_ALL=C sort" in text  # rank 0 is on the node whose name comes first as text


@pytest.mark.parametrize("path", MANIFESTS, **names)
def test_kubernetes_accepts_core_kinds_and_every_pod(path: Path) -> None:
    for document in _documents(path):
        if "." not in document["apiVersion"] or document["apiVersion"].split("/")[0].endswith(
            ".k8s.io"
        ):
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    pods = _pod_of(path)
    assert pods
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "rank"}, **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, **names)
def test_a_pod_has_no_rights_that_it_does_not_need_and_the_token_from_a_secret(path: Path) -> None:
    for pod in _pod_of(path):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["automountServiceAccountToken"] is False
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["token"]["secret"]["secretName"] == "megatrain-token"
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts.keys() == volumes.keys()
            assert mounts["token"]["readOnly"] is True


def test_kubeflows_job_is_elastic_and_its_places_are_the_layouts() -> None:
    spec = _job(DOCKER / "kubernetes/pytorchjob.yaml", "PyTorchJob")["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]  # a master would have rank 0
    assert elastic["rdzvBackend"] == "c10d"
    assert elastic["minReplicas"] == elastic["maxReplicas"] == worker["replicas"]
    container = worker["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"  # the operator looks for this one
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["pytorchjob-port"] == elastic["rdzvPort"]
    command = container["command"]
    sizes = [int(command[command.index(axis) + 1]) for axis in ("--tp", "--dp")]
    assert sizes[0] * sizes[1] == worker["replicas"] * int(spec["nprocPerNode"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])


def test_rays_cluster_has_gpus_on_its_workers_alone_and_a_token() -> None:
    cluster = _job(DOCKER / "kubernetes/kuberay.yaml", "RayJob")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert f"RAY_VERSION={cluster['rayVersion']}" in (DOCKER / "Dockerfile.cuda").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert extras["ray"] == [f"ray=={cluster['rayVersion']}"]


def test_every_option_on_a_command_line_exists() -> None:
    commands = _commands()
    assert len(commands) == 2 * len(COMPOSE) + len(BATCH) + 1
    for where, words in commands.items():
        program = words.index("megatrain")
        known = {"worker": WORKER, "train": TRAIN}[words[program + 1]]
        assert set(_options(words[:program])) <= TORCHRUN, where
        assert set(_options(words[program:])) <= known, where
        assert words[program - 1] == "--no-python", where
        assert BY_OPERATOR.isdisjoint(words) == where.startswith("pytorchjob"), where
        if known is WORKER:
            assert {"--listen", "--token-file"} <= set(words), where


def test_torchrun_and_megatrain_have_the_options_that_are_used() -> None:
    """By the text of their parsers: importing torch takes longer than all the tests here."""
    torch = importlib.util.find_spec("torch")
    assert torch
    assert torch.origin
    source = (Path(torch.origin).parent / "distributed/run.py").read_text()
    assert [option for option in TORCHRUN if f'"{option}"' not in source] == []
    train = (ROOT / "megatrain/cli/train/command.py").read_text()
    assert [option for option in TRAIN if f'"{option}"' not in train] == []


def test_every_image_and_package_has_a_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = [
        image
        for path in DOCKERFILES
        for image in re.findall(r"^ARG \w+_IMAGE=(.*)$", path.read_text(), re.M)
    ]
    assert len(images) == len(DOCKERFILES)
    own = [service["image"] for path in COMPOSE for service in _composed(path)["services"].values()]
    for path in MANIFESTS:
        own += [each["image"] for pod in _pod_of(path) for each in pod["spec"]["containers"]]
    assert [image for image in images + own if not IMAGE.match(image)] == []
    assert {image.partition(":")[2].rpartition("-")[0] for image in own} == {version}
    for path in DOCKERFILES:
        text = path.read_text()
        assert set(re.findall(r"^FROM (\S+)", text, re.M)) <= {
            f"${{{name}}}" for name in re.findall(r"^ARG (\w+_IMAGE)=", text, re.M)
        }
        assert re.findall(r"megatrain:([0-9.]+)", text) == [version] * text.count("megatrain:")
    npu = (DOCKER / "Dockerfile.npu").read_text()
    assert re.search(r"^ARG MINDSPEED_REF=[0-9a-f]{40}$", npu, re.M)
    torch = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch
    assert re.findall(r"^ARG TORCH_NPU_VERSION=(.*)$", npu, re.M) == [torch[1]]


def test_no_file_holds_a_secret() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in FILES
        for match in SECRET.finditer(path.read_text())
    ]
    assert found == []
    assert "/token" in (DOCKER / ".gitignore").read_text().split()  # compose looks for it there


def test_the_readme_names_every_file() -> None:
    text = (DOCKER / "README.md").read_text()
    missing = [path.name for path in FILES if path.suffix != ".md" and path.name not in text]
    assert missing == [".gitignore"]
