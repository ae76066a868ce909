"""Make the checkpoint that is converted, and the tiny one of the warm-up: a process of its own.

python -m megatrain.cli.bench.convert.make JOB.json
"""

import dataclasses
import sys

from megatrain.cli.bench.checkpoint import make_checkpoint
from megatrain.cli.bench.convert.job import SHARD_BYTES, ConvertJob
from megatrain.cli.quickstart.child import report_failure

WARM_UP = "warm-up"


def main() -> None:
    """Make both."""
    job = ConvertJob.read(sys.argv[1])
    with report_failure(job.folder, name="checkpoint"):
        tiny = dataclasses.replace(job, gigabytes=0, checkpoint=job.folder / WARM_UP)
        for each in (tiny, job):
            make_checkpoint(each, shard_bytes=SHARD_BYTES)


if __name__ == "__main__":
    main()
