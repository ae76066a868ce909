"""Transformers + PEFT as a careful user would run it, in a process without any Megatron patch.

Started as `python -m megatrain.cli.bench.peer JOB.json`.  Four configurations: padded batches or a
batch of one, each with and without gradient checkpointing.  In its favour: data are sorted by
length before they are padded, to the same token budget as our micro-batches; right padding gets no
attention mask, which a causal model does not need and SDPA is faster without; forward only takes no
full log-softmax; adapters have the model's precision.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatrain.cli.bench.data import padded_batches
from megatrain.cli.bench.job import Job
from megatrain.cli.bench.memory import PeakMemory, Stopwatch, measurement
from megatrain.cli.bench.turns import Answer, Unit, serve
from megatrain.cli.quickstart.child import report_failure
from megatrain.train.gemm import gemm_rate
from megatrain.types import IGNORED_LABEL

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

GEMM_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}


class Peer:
    """The model with its adapter, and the benchmark's batch at hand."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = [torch.tensor(item["input_ids"]) for item in job.batch()]
        self.num_labels = sum(len(ids) - 1 for ids in self.data)
        self.model = _load(job, self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=job.learning_rate)

    def ready(self) -> Answer:
        """Say where this runs, and what is trained."""
        return {
            "torch_threads": torch.get_num_threads(),
            "num_parameters": sum(p.numel() for p in self.parameters),
        }

    def do(self, unit: Unit) -> Answer:
        """Do one unit of work; memory that does not suffice is an answer too."""
        try:
            return self._do(unit)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            return {"error": "out of memory"}

    def _do(self, unit: Unit) -> Answer:
        if unit["phase"] == "gemm":
            return {"flops_per_second": fastest_gemm(self.device, DTYPES[self.job.dtype])}
        self._set_checkpointing(unit["checkpointing"])
        batches = self._batches(padded=unit["padded"])
        match unit["phase"]:
            case "check":
                return self._check(batches, unit["name"])
            case "forward":
                return self._forward(batches)
            case "train":
                return self._train(batches)
            case unknown:
                raise ValueError(f"unknown phase: {unknown!r}")

    def _set_checkpointing(self, wanted: bool) -> None:
        model = self.model.get_base_model()
        if wanted:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    def _batches(self, *, padded: bool) -> list[list[int]]:
        if not padded:
            return [[index] for index in range(len(self.data))]
        lengths = [len(ids) for ids in self.data]
        return padded_batches(lengths, max_tokens=self.job.max_tokens)

    def _check(self, batches: list[list[int]], name: str) -> Answer:
        logps = [value.float().cpu().numpy() for value in self.logprobs(batches)]
        loss = self.forward_backward(batches)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        self.optimizer.zero_grad()
        file = f"peer_{name.replace(' ', '_').replace(',', '')}.npz"
        np.savez(self.job.folder / file, *logps)
        return {"loss": loss, "grad_norm": norm, "logps": file}

    def _forward(self, batches: list[list[int]]) -> Answer:
        with PeakMemory(self.device) as peak, Stopwatch(self.device) as watch:
            for value in self.logprobs(batches):
                value.cpu()
        return measurement(watch, peak)

    def _train(self, batches: list[list[int]]) -> Answer:
        with PeakMemory(self.device) as peak, Stopwatch(self.device) as watch:
            self.forward_backward(batches)
        with Stopwatch(self.device) as step_watch:
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return measurement(watch, peak) | {"step_seconds": step_watch.seconds}

    @torch.inference_mode()
    def logprobs(self, batches: list[list[int]]) -> list[Tensor]:
        """Return each datum's label log-probabilities, one less than it has tokens, in order."""
        self.model.eval()
        result: dict[int, Tensor] = {}
        for members, ids_BS in self._padded(batches):
            logits_BSV = self.model(input_ids=ids_BS, use_cache=False).logits
            for row, index in enumerate(members):
                length = len(self.data[index])
                logits = logits_BSV[row, : length - 1].float()
                targets = ids_BS[row, 1:length].unsqueeze(1)
                result[index] = logits.gather(1, targets).squeeze(1) - logits.logsumexp(1)
            del logits_BSV
        return [result[index] for index in range(len(self.data))]

    def forward_backward(self, batches: list[list[int]]) -> float:
        """Add the gradient of the mean over all labels; return that mean."""
        self.model.train()
        loss = 0.0
        for members, ids_BS in self._padded(batches):
            labels_BS = ids_BS.clone()
            for row, index in enumerate(members):
                labels_BS[row, len(self.data[index]) :] = IGNORED_LABEL
            output = self.model(
                input_ids=ids_BS,
                labels=labels_BS,
                num_items_in_batch=self.num_labels,
                use_cache=False,
            )
            output.loss.backward()
            loss += float(output.loss.detach())
        return loss

    def _padded(self, batches: list[list[int]]) -> Iterator[tuple[list[int], Tensor]]:
        for members in batches:
            rows = [self.data[index] for index in members]
            ids_BS = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            yield members, ids_BS.to(self.device)


def fastest_gemm(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of the fastest square matrix product."""
    return max(gemm_rate(device, dtype, size=size) for size in GEMM_SIZES[device.type])


def _load(job: Job, device: torch.device) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=DTYPES[job.dtype],
        attn_implementation="sdpa",
        device_map=str(device) if device.type == "cuda" else None,
    )
    return PeftModel.from_pretrained(
        model, job.adapter, is_trainable=True, autocast_adapter_dtype=False
    )


if __name__ == "__main__":
    the_job = Job.read(sys.argv[1])
    with report_failure(the_job.folder, name="peer"):
        torch.set_num_threads(the_job.threads)
        peer = Peer(the_job)
        serve(the_job.folder, "peer", rank=0, ready=peer.ready(), do=peer.do)
