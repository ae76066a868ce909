"""`megatrain doctor`: what this machine has, what it lacks, and the command that mends it.

It imports neither torch nor Megatron: torch is asked from a short process of its own, so that a
broken installation is reported rather than suffered.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
from typing import Any

PYTHON = (3, 12)
TORCH_TIMEOUT_S = 120.0

TORCH_QUESTION = """
import json, torch
import torch.distributed as distributed
has_nccl = distributed.is_available() and distributed.is_nccl_available()
print(json.dumps({
    "built_for_cuda": torch.version.cuda,
    "cuda_is_available": torch.cuda.is_available(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version()[:3])) if has_nccl else None,
    "gloo": distributed.is_available() and distributed.is_gloo_available(),
}))
"""

STYLES = {
    "ok": "green",
    "missing": "yellow",
    "wrong version": "red",
    "broken": "red",
    "unrelated": "magenta",
    "not needed here": "dim",
}


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed, what is missing, what it costs, how to mend it",
        description=__doc__,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; return 1 if something required is missing or wrong, else 0."""
    report = examine()
    if args.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        _print_report(report)
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Collect everything that the report says, as plain values."""
    from megatrain.platforms import nvidia, packages  # cli only: keeps `--help` instant

    gpus = nvidia.query_gpus()
    findings = packages.inspect(device_kinds(num_gpus=len(gpus)))
    torch_facts = ask_torch() if packages.is_importable("torch") else {"error": "not installed"}
    python_ok = sys.version_info[:2] == PYTHON
    return {
        "ok": python_ok and "error" not in torch_facts and not any(f.fatal for f in findings),
        "python": {"version": platform.python_version(), "ok": python_ok},
        "machine": machine(),
        "devices": [dataclasses.asdict(gpu) for gpu in gpus],
        "torch": torch_facts,
        "packages": [dataclasses.asdict(finding) for finding in findings],
        "notes": notes(gpus, torch_facts),
    }


def device_kinds(*, num_gpus: int) -> frozenset[str]:
    """Name the kinds of device that this machine has."""
    kinds = {"cpu"}
    if num_gpus:
        kinds.add("cuda")
    if pathlib.Path("/dev/davinci_manager").exists():
        kinds.add("npu")
    return frozenset(kinds)


def ask_torch(*, timeout_s: float = TORCH_TIMEOUT_S) -> dict[str, Any]:
    """Import torch in a process of its own and return what it says, or `error`."""
    command = [sys.executable, "-c", TORCH_QUESTION]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch took more than {timeout_s:.0f} s"}
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        last_words = answer.stderr.strip().splitlines()[-1:] or [f"exit {answer.returncode}"]
        return {"error": f"torch cannot be imported: {last_words[0]}"}
    facts: dict[str, Any] = json.loads(lines[-1])
    return facts


def machine() -> dict[str, Any]:
    """Count the processors and the memory that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
    }


def _memory_bytes() -> int:
    """Physical memory, or the container's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(physical, int(text)) if text.isdigit() else physical


def notes(gpus: Any, torch_facts: dict[str, Any]) -> list[str]:
    """Say what the table cannot: combinations that work, but not as one would expect."""
    from megatrain.platforms import nvidia

    lines = [torch_facts["error"]] if "error" in torch_facts else []
    if not gpus:
        lines.append("no NVIDIA GPU: training runs on the processors, over Gloo")
    elif torch_facts.get("cuda_is_available") is False:
        lines.append("torch cannot use the GPU: its CUDA build and the driver do not fit together")
    version = nvidia.version_tuple(torch_facts.get("nccl") or "")
    for variable in nvidia.variables(gpus, version, num_ranks=max(2, len(gpus))):
        value = os.environ.get(variable.name)
        origin = "will be set" if value is None else f"you have set it to {value}"
        lines.append(f"{variable.name}={variable.value} ({origin}): {variable.reason}")
    return [*lines, _interface_note()]


def _interface_note() -> str:
    """Say over which network interface ranks would talk."""
    from megatrain.parallel.interface import VARIABLE, gloo_interface, is_one_host

    given, master = os.environ.get(VARIABLE), os.environ.get("MASTER_ADDR")
    if given is not None:
        return f"{VARIABLE}={given} (you have set it)"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = gloo_interface(master, is_one_host=is_one_host(world))
    if chosen is None:
        return f"{VARIABLE} is left to Gloo: no interface leads to MASTER_ADDR={master}"
    several = "" if master else "; on several hosts, the one that leads to MASTER_ADDR"
    return f"{VARIABLE}={chosen[0]} (will be set): {chosen[1]}{several}"


def _print_report(report: dict[str, Any]) -> None:
    from megatrain.platforms import packages

    if not packages.is_importable("rich"):  # the one required package that we print with
        sys.stdout.write(plain_text(report))
        return
    from rich.console import Console

    console = Console()
    console.print(_table(report["packages"]))
    for line in summary_lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="packages", title_justify="left")
    for column in ("package", "version", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it costs, and what mends it", overflow="fold")
    for row in rows:
        status = Text(row["status"], style=STYLES[row["status"]])
        remedy = Text("\n".join(filter(None, (row["cost"], row["mend"]))))
        table.add_row(row["name"], version_text(row), status, remedy)
    return table


def version_text(row: dict[str, Any]) -> str:
    """Name the installed version, and the wanted one where it differs."""
    installed = row["installed"] or "-"
    return (
        installed
        if row["status"] == "ok" or not row["wanted"]
        else (f"{installed}, not {row['wanted']}")
    )


def summary_lines(report: dict[str, Any]) -> list[str]:
    """Describe machine, devices and verdict in a few lines."""
    python, host, torch = report["python"], report["machine"], report["torch"]
    wanted = "" if python["ok"] else f", but {'.'.join(map(str, PYTHON))} is needed"
    lines = [
        f"python   {python['version']}{wanted}",
        f"machine  {host['system']}, {host['cores']} cores, {host['memory_gib']} GiB",
        f"torch    CUDA {torch.get('built_for_cuda') or '-'}, NCCL {torch.get('nccl') or '-'}",
    ]
    for gpu in report["devices"]:
        memory = f"{gpu['memory_mib'] / 1024:.0f} GiB"
        capability = ".".join(map(str, gpu["capability"]))
        lines.append(f"cuda:{gpu['index']}   {gpu['name']}, {memory}, capability {capability}")
    lines += [f"note     {note}" for note in report["notes"]]
    verdict = "all that is required is there" if report["ok"] else "something required is wrong"
    return [*lines, f"verdict  {verdict}"]


def plain_text(report: dict[str, Any]) -> str:
    """Say the same without rich."""
    lines = []
    for row in report["packages"]:
        lines.append(f"{row['name']:24} {version_text(row):24} {row['status']}")
        lines += [f"    {text}" for text in (row["cost"], row["mend"]) if text]
    return "\n".join([*lines, *summary_lines(report), ""])
