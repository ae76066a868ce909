"""What the exported adapter is worth: verification against PEFT, and samples.  No Megatron here.

Run as a process of its own: `python -m megatrain.cli.quickstart.evaluate JOB.json`.
"""

import json
import sys

from safetensors.numpy import load_file
from transformers import AutoTokenizer

from megatrain.cli.quickstart import task
from megatrain.cli.quickstart.child import report_failure
from megatrain.cli.quickstart.job import VERIFIED_CONVERSATIONS, Job
from megatrain.cli.quickstart.samples import write_samples
from megatrain.cli.quickstart.tokenizer import encode_task
from megatrain.export.verify import compare_with_peft

VERIFY_TIMEOUT_S = 300.0


def verify(job: Job) -> float:
    """Return the largest difference of log-probabilities between the trainer and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(job.base)
    _, held_out = task.split()
    data = encode_task(tokenizer, held_out[:VERIFIED_CONVERSATIONS])
    arrays = load_file(job.held_out)
    expected = [arrays[f"logps.{index}"] for index in range(len(data))]
    return compare_with_peft(
        job.base, job.adapter, data, expected, timeout_s=VERIFY_TIMEOUT_S, dtype="float32"
    )


if __name__ == "__main__":
    _job = Job.read(sys.argv[1])
    with report_failure(_job.logs, name="evaluation"):
        _difference = verify(_job)
        _job.verification.write_text(json.dumps({"max_logprob_difference": _difference}) + "\n")
        write_samples(_job)
