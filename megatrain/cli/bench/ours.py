"""What each of our ranks runs when it is measured: the public API and nothing else.

Started alone or by torchrun: `python -m megatrain.cli.bench.ours JOB.json`.
"""

import os
import sys
from typing import Any

import numpy as np
import torch

import megatrain
from megatrain.cli.bench.job import DTYPES, Job
from megatrain.cli.bench.memory import PeakMemory, Stopwatch, measurement
from megatrain.cli.bench.turns import Answer, Unit, serve
from megatrain.cli.quickstart.child import report_failure

CONFIGURATION = "packed"


class Ours:
    """megatrain with the benchmark's batch at hand."""

    def __init__(self, job: Job, *, rank: int) -> None:
        self.job, self.rank, self.batch = job, rank, job.batch()
        megatrain.initialize(mode="local", global_device_mesh=job.mesh, seed=job.seed)
        self.device = _device()
        self.model = _open_model(job)

    def ready(self) -> Answer:
        """Say where this runs."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return {
            "device": name,
            "torch_threads": torch.get_num_threads(),
            "num_parameters": _num_trained(self.model),
        }

    def do(self, unit: Unit) -> Answer:
        """Do one unit of work."""
        match unit["phase"]:
            case "check":
                return self._check()
            case "forward":
                return self._forward()
            case "train":
                return self._train()
            case unknown:
                raise ValueError(f"unknown phase: {unknown!r}")

    def _check(self) -> Answer:
        """Return loss and gradient; log-probabilities go to a file.  This is the warm-up too."""
        logps = self.model.forward_only(inputs=self.batch).logps
        output = self.model.forward_backward(inputs=self.batch)
        norm = self.model.clip_grad_norm(max_grad_norm=1.0)
        self.model.zero_grad()
        if self.rank == 0:
            np.savez(self.job.folder / "ours.npz", *logps)
        return {"loss": output.loss, "grad_norm": norm, "logps": "ours.npz"}

    def _forward(self) -> Answer:
        with PeakMemory(self.device) as peak, Stopwatch(self.device) as watch:
            self.model.forward_only(inputs=self.batch)
        return measurement(watch, peak)

    def _train(self) -> Answer:
        with PeakMemory(self.device) as peak, Stopwatch(self.device) as watch:
            self.model.forward_backward(inputs=self.batch)
        with Stopwatch(self.device) as step_watch:
            self.model.clip_grad_and_step(max_grad_norm=1.0)
        return measurement(watch, peak) | {"step_seconds": step_watch.seconds}


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _open_model(job: Job) -> Any:
    model = megatrain.MegatronModel(
        model_id=str(job.checkpoint),
        mixed_precision=DTYPES[job.dtype],
        backend=job.backend,
        recompute=job.recompute,
        max_tokens_per_microbatch=job.max_tokens,
    )
    # B is random as well, or the check could not see what the adapter does.
    lora = {
        "r": job.rank,
        "lora_alpha": job.rank,
        "target_modules": "all-linear",
        "init_lora_weights": False,
    }
    model.add_adapter_to_model("default", lora)
    model.set_optimizer("AdamW", lr=job.learning_rate)
    model.save("adapter", output_dir=job.folder)
    return model


def _num_trained(model: Any) -> int:
    """Count this rank's trained entries."""
    factors = model._network.adapters["default"].trained_parameters()
    return sum(each.parameter.numel() for each in factors)


def main() -> None:
    """Run one rank; leave its traceback where the command finds it."""
    rank = int(os.environ.get("RANK", "0"))
    job = Job.read(sys.argv[1])
    with report_failure(job.folder, name=f"ours rank {rank}"):
        torch.set_num_threads(job.threads_per_rank)
        ours = Ours(job, rank=rank)
        serve(job.folder, "ours", rank=rank, ready=ours.ready(), do=ours.do)
        megatrain.shutdown()


if __name__ == "__main__":
    main()
