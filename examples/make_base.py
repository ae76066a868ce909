"""The small models that the examples train: quickstart's, with less training, in seconds.

    python examples/make_base.py

writes `models/dense` (Qwen3) and `models/moe` (Qwen3-MoE), both with the same tokenizer.  Any other
checkpoint does as well: add `--set model.id=Qwen/Qwen3-0.6B` to an example's command.
"""

import sys
import tempfile
from pathlib import Path

from megatrain.cli.quickstart.base_model import corpus, train_base
from megatrain.cli.quickstart.job import Job
from megatrain.cli.quickstart.tokenizer import build_tokenizer
from megatrain.parallel.layout import DeviceMesh


class ShortJob(Job):
    """Quickstart's job with a base that has only begun to learn."""

    @property
    def base_steps(self) -> int:
        """Optimizer steps."""
        return 20


def main() -> None:
    """Make both models."""
    tokenizer = build_tokenizer(corpus(seed=42), vocab_size=1536)
    for name, moe in (("dense", False), ("moe", True)):
        with tempfile.TemporaryDirectory() as folder:
            job = ShortJob(out=Path(folder), mesh=DeviceMesh(), moe=moe)
            job.logs.mkdir()
            model = train_base(job, tokenizer)
        model.save_pretrained(f"models/{name}")
        tokenizer.save_pretrained(f"models/{name}")
        sys.stdout.write(f"models/{name}: {model.num_parameters():,} parameters\n")


if __name__ == "__main__":
    main()
