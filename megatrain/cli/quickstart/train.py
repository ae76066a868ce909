"""What each rank runs: load the base, inject LoRA, train, export.  The public API and nothing else.

Started by torchrun: `python -m megatrain.cli.quickstart.train JOB.json`.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
from peft import LoraConfig
from safetensors.numpy import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import megatrain
from megatrain.cli.quickstart import task
from megatrain.cli.quickstart.child import report_failure
from megatrain.cli.quickstart.job import VERIFIED_CONVERSATIONS, Job
from megatrain.cli.quickstart.tokenizer import encode_task
from megatrain.types import InputFeature


def train(job: Job, *, rank: int) -> None:
    """Train an adapter and save it.  Collective over all ranks of the job's mesh."""
    megatrain.initialize(mode="local", global_device_mesh=job.mesh, seed=job.seed, platform="cpu")
    model = megatrain.MegatronModel(model_id=str(job.base), mixed_precision="no")
    model.add_adapter_to_model(
        "default",
        LoraConfig(r=job.lora_rank, lora_alpha=job.lora_alpha, target_modules="all-linear"),
    )
    model.set_optimizer("AdamW", lr=job.learning_rate, weight_decay=0.0)
    model.set_lr_scheduler(
        "CosineWarmupScheduler",
        num_warmup_steps=job.warmup_steps,
        num_training_steps=max(job.steps, job.warmup_steps + 1),
    )

    tokenizer = AutoTokenizer.from_pretrained(job.base)
    train_questions, held_out = task.split()
    batches = task_batches(tokenizer, train_questions, job)
    for step in range(1, job.steps + 1):
        start, inputs = time.perf_counter(), next(batches)
        model.forward_backward(inputs=inputs)
        model.clip_grad_and_step(max_grad_norm=1.0)
        seconds = time.perf_counter() - start
        metric = model.calculate_metric(is_training=True)
        if rank == 0:
            _write_metrics(job, metric | {"step": step, "seconds": seconds})

    model.save("adapter", output_dir=job.out)
    inputs = encode_task(tokenizer, held_out[:VERIFIED_CONVERSATIONS])
    logps = model.forward_only(inputs=inputs).logps
    if rank == 0:
        arrays = {f"logps.{index}": np.asarray(row) for index, row in enumerate(logps)}
        save_file(arrays, job.held_out)


def task_batches(
    tokenizer: PreTrainedTokenizerBase, questions: list[task.Question], job: Job
) -> Iterator[list[InputFeature]]:
    """Yield tokenised batches without end, the same on every rank."""
    for batch in task.Batches(questions, size=job.batch_size, seed=job.seed):
        yield encode_task(tokenizer, batch)


def _write_metrics(job: Job, metric: dict[str, float]) -> None:
    """Append one line, which the command shows; `tokens_per_second` counts the whole step."""
    metric["tokens_per_second"] = metric["tokens"] / metric["seconds"]
    with job.metrics.open("a") as file:
        file.write(json.dumps(metric) + "\n")


def main() -> None:
    """Run one rank; leave its traceback where the command finds it."""
    rank = int(os.environ.get("RANK", "0"))
    job = Job.read(sys.argv[1])
    with report_failure(job.logs, name=f"rank {rank}"):
        print(f"rank {rank}: megatrain {version('megatrain')}, {job.mesh.describe()}", flush=True)
        train(job, rank=rank)
        megatrain.shutdown()


if __name__ == "__main__":
    main()
