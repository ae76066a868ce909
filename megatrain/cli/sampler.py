"""`megatrain sampler`: installs vLLM in an environment of its own, and looks whether it works.

megatrain sampler install --cuda
megatrain sampler check
megatrain serve --model Qwen/Qwen3-8B --sampler vllm
"""

import argparse
from pathlib import Path
from typing import Any

from megatrain.errors import ConfigError


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "sampler",
        help="vLLM for sampling: install, check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    install = actions.add_parser("install", help="make an environment with vLLM; takes minutes")
    kind = install.add_mutually_exclusive_group()
    kind.add_argument("--cuda", action="store_true", help="for NVIDIA's devices, if there are any")
    kind.add_argument("--cpu", action="store_true", help="for processors: to develop and to test")
    install.add_argument(
        "--python", choices=("3.12", "3.11"), default="3.12", help="default: %(default)s"
    )
    check = actions.add_parser("check", help="tell what is installed, and try it")
    for each in (install, check):
        each.add_argument(
            "--into",
            type=Path,
            metavar="DIR",
            help="default: MEGATRAIN_VLLM_HOME, or ~/.cache/megatrain/vllm",
        )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit status.  Raises ConfigError, PlatformError."""
    # `--help` should answer at once.
    from megatrain.sampler.vllm import environment
    from megatrain.sampler.vllm.command import by_hand

    folder = args.into or environment.home()
    if args.action == "install":
        is_cpu = args.cpu or not (args.cuda or environment.has_cuda())
        kind: environment.Kind = "cpu" if is_cpu else "cuda"
        found = environment.install(kind, python=args.python, folder=folder)
        versions = environment.versions_of(found)
    elif (there := environment.find(folder)) is not None:
        found, versions = there, environment.check(there)
    else:
        raise ConfigError(
            f"there is no finished installation of vLLM in {folder}",
            hint="run `megatrain sampler install`",
        )
    print(f"vLLM for {found.kind}\t{found.folder}")
    for name, value in versions.items():
        print(f"{name}\t{value}")
    if args.action == "check":
        print(f"a server of your own, for --sampler-address, needs\t{by_hand()}")
    return 0
