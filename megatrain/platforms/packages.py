"""What is installed, what is missing, what that costs, and the command that mends it.  No torch.

Only distribution metadata and import specs are read: nothing is imported, so that a package that
crashes when imported can still be reported.
"""

import functools
import importlib.metadata
import importlib.util
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

PROJECT = "megatrain"
PIN = re.compile(r"^([A-Za-z0-9._-]+)\s*==\s*([^\s;,]+)")

WITHOUT_DEPENDENCIES = frozenset({"megatron-bridge"})
"""Packages whose declared dependencies cannot all be installed on a machine without CUDA."""


class Status(StrEnum):
    """What was found."""

    OK = "ok"
    MISSING = "missing"
    WRONG = "wrong version"
    BROKEN = "broken"
    UNRELATED = "unrelated"
    NOT_NEEDED = "not needed here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Optional:
    """A package that megatrain uses when it is there."""

    name: str
    """Name of the distribution."""
    module: str
    """Top-level module that it brings."""
    also: tuple[str, ...] = ()
    """Other distributions that bring the same module."""
    devices: frozenset[str] = frozenset({"cpu", "cuda", "npu"})
    """Kinds of device on which it is of any use."""
    cost: str
    """What is lost without it."""
    mend: str
    """Command that installs it."""


CUDA = frozenset({"cuda"})
NPU = frozenset({"npu"})

OPTIONALS = (
    Optional(
        name="transformer-engine",
        module="transformer_engine",
        also=("transformer-engine-torch",),
        devices=CUDA,
        cost="no FP8 and no model.backend='te'; the torch back end is used",
        mend="pip install --no-build-isolation 'transformer-engine[pytorch]'",
    ),
    Optional(
        name="flash-attn",
        module="flash_attn",
        devices=CUDA,
        cost="attention runs on torch's own fused kernels",
        mend="pip install --no-build-isolation flash-attn",
    ),
    Optional(
        name="flash-linear-attention",
        module="fla",
        also=("fla-core",),
        devices=CUDA,
        cost="gated delta-net layers (Qwen3-Next, Qwen3.5) run in plain torch, more slowly",
        mend="pip install flash-linear-attention",
    ),
    Optional(
        name="triton",
        module="triton",
        also=("pytorch-triton", "triton-windows"),
        devices=CUDA,
        cost="no Triton kernels; the torch reference of every op is used",
        mend="pip install triton",
    ),
    Optional(
        name="torch-npu",
        module="torch_npu",
        devices=NPU,
        cost="Ascend NPUs cannot be used",
        mend="use an Ascend image with CANN, or pip install torch-npu",
    ),
    Optional(
        name="mindspeed",
        module="mindspeed",
        devices=NPU,
        cost="Megatron runs on NPUs without Ascend's fused kernels",
        mend="install the MindSpeed that fits this megatron-core, see its guide",
    ),
    Optional(
        name="vllm",
        module="vllm",
        devices=CUDA,
        cost="exported adapters cannot be served by vLLM from this environment",
        mend="install it in an environment of its own: uv venv sampler && uv pip install vllm",
    ),
)

APEX_COST = "Megatron's fused kernels from NVIDIA apex are not used; torch's are"
APEX_MEND = "comes with NVIDIA's images; never `pip install apex`, which is an unrelated project"
APEX_UNRELATED = "this is not NVIDIA's apex but an unrelated project of the same name"
ADAPTER_UNRELATED = "this package from PyPI is unrelated to the mcore_adapter of ROLL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    """Name of the distribution."""
    status: Status
    """What was found."""
    required: bool
    """Whether megatrain cannot work when the status is not OK."""
    installed: str | None = None
    """Version that is installed."""
    wanted: str | None = None
    """Exact version that megatrain is tested with, where it has one."""
    cost: str = ""
    """What is lost as it is; empty when all is well."""
    mend: str = ""
    """Command that mends it; empty when all is well."""

    @property
    def fatal(self) -> bool:
        """Whether it keeps megatrain from working."""
        return self.required and self.status is not Status.OK


@dataclass(frozen=True, slots=True)
class Distribution:
    """The facts about an installed distribution that tell it from another of the same name."""

    version: str
    """Its version."""
    summary: str = ""
    """Its one-line description."""
    files: tuple[str, ...] = ()
    """What it installed, as far as it says."""
    from_index: bool = True
    """Whether it came from a package index rather than from a URL or a folder."""


def normalised(name: str) -> str:
    """Return a distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(requirements: Iterable[str]) -> dict[str, str]:
    """Return exact versions by name; requirements with extras of ours or without `==` are left."""
    found = {}
    for line in requirements:
        match = PIN.match(line)
        if match and "extra ==" not in line:
            found[normalised(match[1])] = match[2]
    return found


def project_pins() -> dict[str, str]:
    """Return the exact versions that the installed megatrain declares; none if not installed."""
    try:
        return pins(importlib.metadata.requires(PROJECT) or ())
    except importlib.metadata.PackageNotFoundError:
        return {}


def find(*names: str) -> Distribution | None:
    """Return the first of these distributions that is installed."""
    for name in names:
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return Distribution(
            version=found.version,
            summary=found.metadata.get("Summary", "") or "",
            files=tuple(str(path) for path in found.files or ()),
            from_index=found.read_text("direct_url.json") is None,
        )
    return None


def is_importable(module: str) -> bool:
    """Tell whether a top-level module can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def is_nvidia_apex(apex: Distribution, *, has_kernels: bool) -> bool:
    """Tell NVIDIA's apex from the web toolkit of the same name on PyPI.

    `has_kernels` says whether the module amp_C, which only NVIDIA's builds, can be found.
    """
    brings = any(path.startswith("apex/normalization/") for path in apex.files)
    return has_kernels or brings or "nvidia" in apex.summary.lower()


def check_pin(name: str, wanted: str, found: Distribution | None) -> Finding:
    """Compare a required distribution with its exact version; a local label (+cu130) is free."""
    options = "--no-deps " if name in WITHOUT_DEPENDENCIES else ""
    mend = f"uv sync, or: pip install {options}{shlex.quote(f'{name}=={wanted}')}"
    result = functools.partial(Finding, name=name, required=True, wanted=wanted)
    if found is None:
        return result(status=Status.MISSING, cost="megatrain does not work", mend=mend)
    if found.version.split("+")[0] != wanted:
        cost = "a combination of versions that nobody has tested"
        return result(status=Status.WRONG, installed=found.version, cost=cost, mend=mend)
    return result(status=Status.OK, installed=found.version)


def check_optional(
    package: Optional, found: Distribution | None, *, importable: bool, devices: frozenset[str]
) -> Finding:
    """Say whether an optional package is there, and what it costs if not, on these devices."""
    result = functools.partial(Finding, name=package.name, required=False)
    version = found.version if found else None
    if importable:
        return result(status=Status.OK, installed=version or "unknown")
    if found is not None:
        return result(status=Status.BROKEN, installed=version, cost=package.cost, mend=package.mend)
    if not package.devices & devices:
        return result(status=Status.NOT_NEEDED, cost=package.cost)
    return result(status=Status.MISSING, cost=package.cost, mend=package.mend)


def check_apex(
    found: Distribution | None, *, has_kernels: bool, devices: frozenset[str]
) -> Finding:
    """Say whether NVIDIA's apex is there; warn about the unrelated project."""
    result = functools.partial(Finding, name="apex", required=False)
    if found is None:
        needed = "cuda" in devices
        status = Status.MISSING if needed else Status.NOT_NEEDED
        return result(status=status, cost=APEX_COST, mend=APEX_MEND if needed else "")
    if is_nvidia_apex(found, has_kernels=has_kernels):
        return result(status=Status.OK, installed=found.version)
    return result(
        status=Status.UNRELATED,
        installed=found.version,
        cost=APEX_UNRELATED,
        mend="pip uninstall apex",
    )


def check_mcore_adapter(found: Distribution | None) -> Finding | None:
    """Warn about the unrelated project; megatrain needs nothing of this name, so else None."""
    if found is None or not found.from_index:
        return None
    return Finding(
        name="mcore-adapter",
        status=Status.UNRELATED,
        required=False,
        installed=found.version,
        cost=ADAPTER_UNRELATED,
        mend="pip uninstall mcore-adapter",
    )


def check_project(found: Distribution | None) -> Finding:
    """Say whether megatrain itself is installed: its metadata holds the exact versions."""
    if found is not None:
        return Finding(name=PROJECT, status=Status.OK, required=True, installed=found.version)
    return Finding(
        name=PROJECT,
        status=Status.MISSING,
        required=True,
        cost="exact versions are unknown, and nothing below can be compared with them",
        mend="uv sync, or: pip install --no-deps --editable .",
    )


def inspect(devices: frozenset[str]) -> list[Finding]:
    """Look at everything that megatrain needs or uses on these kinds of device."""
    findings = [check_project(find(PROJECT))]
    findings += [check_pin(name, wanted, find(name)) for name, wanted in project_pins().items()]
    for package in OPTIONALS:
        found = find(package.name, *package.also)
        importable = is_importable(package.module)
        findings.append(check_optional(package, found, importable=importable, devices=devices))
    findings.append(check_apex(find("apex"), has_kernels=is_importable("amp_C"), devices=devices))
    adapter = check_mcore_adapter(find("mcore-adapter"))
    return findings if adapter is None else [*findings, adapter]
