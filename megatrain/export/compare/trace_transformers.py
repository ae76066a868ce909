"""A trace of Transformers and PEFT, in a process of its own that has no Megatron and no patches.

    python -m megatrain.export.compare.trace_transformers FOLDER

FOLDER holds request.json (base_model, adapter or null, dtype) and data.safetensors (`input_ids.i`);
the trace is written to it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from megatrain.export.compare.trace import LOGPROBS, Recorder, Seen, input_of, rows_of
from megatrain.export.verify import DATA, REQUEST, load_model

INTO_RESIDUAL = ("o_proj", "down_proj", "out_proj", "dense", "c_proj", "fc2", "w2", "wo")
"""Last names of linears whose input is a point of its own: what attention or the gate made."""


class Tracer:
    """Hooks on the modules of one Transformers model."""

    def __init__(self, model: Any) -> None:
        self.model, self.recorder = model, Recorder()
        self.datum, self.num_tokens = 0, 0
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = {module: name for name, module in base.named_modules()}
        decoder = base.get_decoder()
        embedding = base.get_input_embeddings()
        # The base is frozen: without a leaf in front of it there would be no gradient at all.
        embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
        layers = list(decoder.layers)
        self._hook_before(layers[0], names[embedding])
        for layer in layers:
            self._hook_layer(layer, names[layer])
        norms = [child for child in decoder.children() if "Norm" in type(child).__name__]
        for norm in norms:
            self._hook_after(norm, names[norm])

    def _hook_layer(self, layer: nn.Module, name: str) -> None:
        self._hook_after(layer, name)
        for child_name, child in layer.named_children():
            self._hook_after(child, f"{name}.{child_name}")
        for path, module in layer.named_modules():
            is_inside_lora = ".base_layer" in path or ".lora_" in path
            if is_inside_lora or ".experts." in path or "." not in path:
                continue
            if isinstance(module, nn.Linear | LoraLayer):
                self._hook_after(module, f"{name}.{path}")
                if path.rpartition(".")[2] in INTO_RESIDUAL:
                    self._hook_before(module, input_of(f"{name}.{path}"))

    def _hook_after(self, module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda module, args, out: self._watch(name, _first(out)))

    def _hook_before(self, module: nn.Module, name: str) -> None:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._watch(name, args[0] if args else kwargs["hidden_states"])

        module.register_forward_pre_hook(watch, with_kwargs=True)

    def _watch(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor) and rows_of(output) == self.num_tokens:
            rows = torch.arange(self.num_tokens)
            self.recorder.watch(name, self.datum, output, Seen(rows, rows))

    def run(self, index: int, input_ids: Tensor) -> None:
        """Run one sequence forward and backward; the loss is the sum of -log p of its tokens."""
        self.datum, self.num_tokens = index, len(input_ids)
        with torch.enable_grad():
            logits = self.model(input_ids=input_ids[None], use_cache=False).logits[0, :-1].float()
            logps = logits.log_softmax(-1).gather(-1, input_ids[1:, None])
            rows = torch.arange(len(logps))
            self.recorder.watch(LOGPROBS, index, logps, Seen(rows + 1, rows))
            (-logps.sum()).backward()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def trace(folder: Path) -> None:
    """Answer the request in a folder."""
    request = json.loads((folder / REQUEST).read_text())
    dtype = getattr(torch, request["dtype"])
    model = load_model(request["base_model"], request["adapter"], dtype=dtype)
    model.requires_grad_(False)
    tracer = Tracer(model)
    data = load_file(folder / DATA)
    for index in range(len(data)):
        tracer.run(index, data[f"input_ids.{index}"])
    tracer.recorder.write(folder, stage=0, rank=0)


if __name__ == "__main__":
    trace(Path(sys.argv[1]))
