"""One side of a comparison of what is computed: which model, by what, and the processes for it."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatrain.cli.quickstart.child import python_module, run_child, torchrun
from megatrain.export.compare.tokens import Datum
from megatrain.export.compare.trace import Floats, Point, read_trace
from megatrain.export.verify import ANSWER, DATA, REQUEST, logprobs_in_own_process
from megatrain.parallel.layout import DeviceMesh

TIMEOUT_S = 3600.0
"""For the answer of either system, a large model's loading included."""


@dataclass(frozen=True, slots=True)
class Side:
    """A model, perhaps with an adapter, and what computes it."""

    model: Path
    adapter: Path | None
    system: str
    """transformers or megatrain."""
    mesh: DeviceMesh
    dtype: str

    def describe(self) -> str:
        """Say how it is computed, for a report."""
        what = "Transformers" if self.system == "transformers" else "megatrain"
        layout = f" on layout {self.mesh.describe()}" if self.system == "megatrain" else ""
        return f"{what}{layout}{' with the adapter' if self.adapter else ''}, {self.dtype}"

    def logprobs(self, data: Sequence[Datum]) -> list[Floats]:
        """Return the log-probabilities of all tokens, one array a datum.

        Raises what failed first in the processes that compute them.
        """
        if self.system == "transformers":
            return logprobs_in_own_process(
                self.model, self.adapter, data, timeout_s=TIMEOUT_S, dtype=self.dtype
            )
        with tempfile.TemporaryDirectory(prefix="megatrain-verify-") as name:
            self._run(Path(name), data, layers=False)
            found = load_file(Path(name) / ANSWER)
        return [found[f"logprobs.{index}"].numpy() for index in range(len(data))]

    def trace(self, data: Sequence[Datum]) -> dict[str, Point]:
        """Return activations and gradients of every module.  Raises as `logprobs` does."""
        with tempfile.TemporaryDirectory(prefix="megatrain-verify-") as name:
            self._run(Path(name), data, layers=True)
            return read_trace(Path(name))

    def _run(self, folder: Path, data: Sequence[Datum], *, layers: bool) -> None:
        request = {
            "base_model": str(self.model.absolute()),
            "adapter": None if self.adapter is None else str(self.adapter.absolute()),
            "dtype": self.dtype,
            "mesh": asdict(self.mesh),
            "layers": layers,
        }
        (folder / REQUEST).write_text(json.dumps(request))
        columns = ("input_ids",) if self.system == "transformers" else ("input_ids", "labels")
        tensors = {
            f"{column}.{index}": torch.tensor(datum[column])
            for index, datum in enumerate(data)
            for column in columns
        }
        save_file(tensors, folder / DATA)
        size = 1
        if self.system == "transformers":
            module = "megatrain.export.compare.trace_transformers"
            command = python_module(module, str(folder))
        else:
            size = self.mesh.world_size
            module = "megatrain.cli.convert.verify_job"
            command = torchrun(module, str(folder), world_size=size)
        run_child(
            command,
            name=self.system,
            logs=folder,
            processes=size,
            progress=None,
            stall_timeout_s=TIMEOUT_S,
        )
