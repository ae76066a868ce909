"""`megatrain convert adapter export`: the adapter of a training state, for PEFT or for vLLM.

From the state alone.  For PEFT, ranks, alphas and rsLoRA stay as they are.  For vLLM, which knows
one rank and one scale, every scale goes into B; what it cannot hold is refused by name.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatrain.cli.convert.adapter_job import add_places, check_target, small_plan, write
from megatrain.cli.convert.job import Progress, add_options, run_job

TOLERANCES = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}
"""Of a product whose scale went into B, by the dtype it was rounded to."""


def add_parser(subparsers: Any) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "export", help="training state to PEFT directory", description=__doc__
    )
    add_places(parser, state="a folder or URL with state/ in it", out="a new folder, or a URL")
    parser.add_argument(
        "--for", dest="consumer", choices=("peft", "vllm"), default="peft", help="default: peft"
    )
    parser.add_argument(
        "--base", metavar="HF_DIR", help="the base's config.json, for states that do not hold it"
    )
    add_options(
        parser,
        verify="read it back and compare; ask PEFT, if the base's config is known",
        restart=False,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert; return 0."""
    from megatrain.checkpoint.remote import local_source, local_target
    from megatrain.export.adapters.from_state import read_saved

    with (
        local_source(args.state, is_checkpoint=False) as source,
        local_target(args.out) as target,
    ):
        check_target(target, source)
        saved = read_saved(source)
        plan = small_plan(
            "export",
            args.state,
            args.out,
            sum(each.nbytes for each in (*saved.tensors.values(), *saved.carried.values())),
            len(saved.tensors) + len(saved.carried),
            consumer=args.consumer,
            step=saved.record.step,
        )
        return run_job(args, plan, lambda progress: _export(args, saved, target, progress))


def _export(
    args: argparse.Namespace, saved: Any, target: Path, progress: Progress
) -> Mapping[str, Any]:
    from megatrain.export.adapters.from_state import embeddings_of, for_peft
    from megatrain.export.adapters.vllm import for_vllm

    config = _config(args, saved)
    files, result = for_peft(saved, config), {}
    if args.consumer == "vllm":
        adapter = for_vllm(
            saved.spec,
            saved.tensors,
            base_model=saved.record.base_model,
            embeddings=embeddings_of(files),
        )
        files = adapter.files
        targets = " ".join(adapter.target_modules)
        result["experts"] = adapter.experts
        result["vllm_options"] = (
            f"--enable-lora --max-lora-rank {adapter.max_lora_rank} --lora-target-modules {targets}"
        )

    def check(folder: Path) -> None:
        result["verified"] = _verify(args, saved, folder, config)

    write(target, files, check if args.verify else None)
    progress(sum(each.nbytes for each in files.weights.values()))
    return result


def _config(args: argparse.Namespace, saved: Any) -> dict[str, Any] | None:
    """Return the base's configuration if it is known: from --base, or from the state."""
    if args.base is None:
        known: dict[str, Any] | None = saved.record.base_config
        return known
    from megatrain.checkpoint.locate import TOKENIZER_FILES, locate

    found = json.loads((locate(args.base, TOKENIZER_FILES) / "config.json").read_text())
    return dict(found)


def _verify(
    args: argparse.Namespace, saved: Any, target: Path, config: dict[str, Any] | None
) -> str:
    from megatrain.errors import ExportError
    from megatrain.export.adapters.peft_file import read_peft
    from megatrain.export.adapters.products import largest_difference
    from megatrain.export.peft_adapter import read_adapter

    if args.consumer == "peft":
        if config is None:
            return "read back; PEFT was not asked, since the base's config is not known (--base)"
        read_adapter(target, hf_config=config)
        return "read back; PEFT takes exactly these tensors"
    found = largest_difference(read_peft(target), saved.spec, saved.tensors)
    dtype = min(str(each.dtype).removeprefix("torch.") for each in saved.tensors.values())
    if found > TOLERANCES.get(dtype, 1e-6):
        raise ExportError(f"B A is off by {found:.2g}, relative to its norm, in {target}")
    return f"read back; every B A is the state's, within {found:.2g} of its norm"
