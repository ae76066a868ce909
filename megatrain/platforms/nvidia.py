"""What NVIDIA's tools say of this machine, and the variables that follow.  No torch, no context.

CUDA reads its variables when the first context is made, so that nothing here may make one: devices
are asked for through nvidia-smi.
"""

import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

Version = tuple[int, ...]

FIRST_BLACKWELL = 10
"""Major compute capability of B100, B200 and GB200; Hopper has 9, workstation Blackwell 12."""

P2P_HANG_FIRST: Version = (2, 26, 0)
P2P_HANG_LAST: Version = (2, 29, 2)
"""NCCL versions, both ends included, with reports of collectives that hang over P2P on Blackwell.

https://github.com/pytorch/pytorch/issues/165727 and https://github.com/NVIDIA/nccl/issues/1999
(2.26.5, 2.27.7 and 2.29.2 were tried there).  Delete this once torch ships only later versions.
"""

QUERY = ("--query-gpu=index,name,compute_cap,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as the driver describes it."""

    index: int
    """Number in the driver's order."""
    name: str
    """Marketing name."""
    capability: Version
    """Compute capability, as (9, 0) for H100."""
    memory_mib: int
    """Total memory in MiB; 0 where the driver does not say."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable to set, with the reason for it."""

    name: str
    """The variable."""
    value: str
    """What to set it to."""
    reason: str
    """Why, in a sentence for the log."""


def version_tuple(text: str) -> Version:
    """Return the leading numbers of a dotted version: `9.0` gives (9, 0), `N/A` gives ()."""
    numbers: list[int] = []
    for part in text.strip().split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Read nvidia-smi's answer to QUERY; lines that are not devices are left out."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4 and fields[0].isdigit():
            memory = int(fields[3]) if fields[3].isdigit() else 0
            gpus.append(Gpu(int(fields[0]), fields[1], version_tuple(fields[2]), memory))
    return tuple(gpus)


def query_gpus(*, timeout_s: float = 20.0) -> tuple[Gpu, ...]:
    """Ask nvidia-smi for the devices; none when it is absent or does not answer in time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    try:
        answer = subprocess.run(
            [program, *QUERY], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(answer.stdout) if answer.returncode == 0 else ()


def is_b200(capability: Version) -> bool:
    """Tell a data-centre Blackwell (compute capability 10.x) from everything else."""
    return capability[:1] == (FIRST_BLACKWELL,)


def p2p_hangs(capability: Version, nccl: Version) -> bool:
    """Tell whether collectives over P2P are known to hang; an unknown NCCL (`()`) counts as yes."""
    affected = not nccl or P2P_HANG_FIRST <= nccl <= P2P_HANG_LAST
    return is_b200(capability) and affected


def wants_one_connection(capability: Version, num_ranks: int) -> bool:
    """Tell whether kernels must be queued in order for sequence parallelism to overlap.

    Megatron asks for it below Blackwell, whenever tensor or context parallelism is used.
    """
    return num_ranks > 1 and bool(capability) and capability[0] < FIRST_BLACKWELL


def variables(gpus: Iterable[Gpu], nccl: Version, *, num_ranks: int) -> tuple[Variable, ...]:
    """Return what should be set for `num_ranks` processes on these devices."""
    capabilities = [gpu.capability for gpu in gpus]
    chosen = []
    if num_ranks > 1 and any(p2p_hangs(capability, nccl) for capability in capabilities):
        version = ".".join(map(str, nccl)) or "unknown"
        reason = (
            f"B200 with NCCL {version}: collectives over P2P can hang (pytorch#165727, nccl#1999); "
            "set it to 0 yourself, or use a later NCCL, to have NVLink back"
        )
        chosen.append(Variable("NCCL_P2P_DISABLE", "1", reason))
    if any(wants_one_connection(capability, num_ranks) for capability in capabilities):
        reason = "Megatron overlaps communication with kernels queued in order (before Blackwell)"
        chosen.append(Variable("CUDA_DEVICE_MAX_CONNECTIONS", "1", reason))
    return tuple(chosen)
