"""Any order of creating, training, saving, loading and deleting adapters, against PEFT alone."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from peft import PeftModel

import megatrain
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess.data import num_labels, random_batch
from tests.multiprocess.truth import hf_model, largest_difference, logps_of

pytestmark = pytest.mark.multiprocess

NAMES = ("a", "b", "c")
BATCHES = [random_batch(3, seed=seed)[1:] for seed in range(4)]
LR = 0.1
LORAS = [
    {"r": 1, "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 2, "target_modules": "all-linear"},
    {"r": 8, "lora_alpha": 4, "target_modules": ["v_proj", "o_proj", "up_proj", "gate_proj"]},
]
CLOSE = 1e-5
"""Log-probabilities of up to 20 in float32, after a few steps of plain SGD."""

some_adapter = st.sampled_from(NAMES)
some_batch = st.integers(0, len(BATCHES) - 1)


class Reference:
    """What PEFT has of one adapter: weights, gradient sums, labels so far."""

    def __init__(self, base: Path, saved: str) -> None:
        self.model = PeftModel.from_pretrained(hf_model(base), saved, is_trainable=True).eval()
        self.labels = 0

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "lora_" in n}

    def backward(self, batch: list) -> None:
        loss = -sum(logps_of(self.model, datum).sum() for datum in batch)
        loss.backward()
        self.labels += num_labels(batch)

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.parameters().values():
            if parameter.grad is not None:
                parameter -= LR * parameter.grad / self.labels
        self.forget()

    def forget(self) -> None:
        self.labels = 0
        self.model.zero_grad()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def fill(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters().items():
            parameter.copy_(weights[name])


class Machine(RuleBasedStateMachine):
    """Adapters on ranks of a driver, and the same adapters in PEFT."""

    base: Path
    model: megatrain.MegatronModel

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.known: dict[str, Reference] = {}
        self.choices: dict[str, int] = {}
        self.saved: dict[str, tuple[str, int, dict[str, torch.Tensor]]] = {}
        self.numbers = itertools.count()

    def teardown(self) -> None:
        for name in list(self.known):
            self.model.delete_adapter(name)
        shutil.rmtree(self.folder)

    def compare(self, name: str, batch: list) -> None:
        ours = self.model.forward_only(inputs=batch, adapter_name=name).logps
        with torch.no_grad():
            theirs = [logps_of(self.known[name].model, datum).numpy() for datum in batch]
        assert largest_difference(ours, theirs) <= CLOSE

    @rule(name=some_adapter, choice=st.integers(0, len(LORAS) - 1))
    def create(self, name: str, choice: int) -> None:
        lora = {"init_lora_weights": False, **LORAS[choice]}
        if name in self.known:
            with pytest.raises(megatrain.StateError, match="already"):
                self.model.add_adapter_to_model(name, lora)
            return
        self.model.add_adapter_to_model(name, lora)
        self.model.set_optimizer("SGD", lr=LR, adapter_name=name)
        saved = self.model.save(
            f"new-{next(self.numbers)}", output_dir=str(self.folder), adapter_name=name
        )
        self.known[name], self.choices[name] = Reference(self.base, saved), choice
        self.saved.pop(name, None)
        assert self.model.adapter_names == list(self.known)

    @rule(name=some_adapter, batch=some_batch)
    def forward_backward(self, name: str, batch: int) -> None:
        if name not in self.known:
            with pytest.raises(megatrain.StateError, match="no adapter"):
                self.model.forward_backward(inputs=BATCHES[batch], adapter_name=name)
            return
        self.compare(name, BATCHES[batch])
        output = self.model.forward_backward(inputs=BATCHES[batch], adapter_name=name)
        assert output.num_tokens == num_labels(BATCHES[batch])
        self.known[name].backward(BATCHES[batch])

    @precondition(lambda self: len(self.known) > 1)
    @rule(batch=some_batch)
    def forward_backward_of_all(self, batch: int) -> None:
        data = [(name, datum) for datum in BATCHES[batch] for name in self.known]
        self.model.forward_backward(
            inputs=[datum for _, datum in data], adapter_name=[name for name, _ in data]
        )
        for reference in self.known.values():
            reference.backward(BATCHES[batch])

    @rule(name=some_adapter)
    def step(self, name: str) -> None:
        if name not in self.known or not self.known[name].labels:
            with pytest.raises(megatrain.StateError):
                self.model.clip_grad_and_step(0.0, adapter_name=name)
            return
        self.model.clip_grad_and_step(0.0, adapter_name=name)
        self.known[name].step()
        self.compare(name, BATCHES[0])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        path = self.model.save(
            f"kept-{next(self.numbers)}", output_dir=str(self.folder), adapter_name=name
        )
        self.saved[name] = path, self.choices[name], self.known[name].weights()

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.saved)))
        path, choice, weights = self.saved[name]
        self.model.load(path, adapter_name=name)
        if name not in self.known:
            self.model.set_optimizer("SGD", lr=LR, adapter_name=name)
            self.known[name], self.choices[name] = Reference(self.base, path), choice
        self.known[name].fill(weights)
        self.known[name].forget()
        self.compare(name, BATCHES[1])

    @rule(name=some_adapter)
    def delete(self, name: str) -> None:
        if name not in self.known:
            with pytest.raises(megatrain.StateError, match="no adapter"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.known[name]
        assert self.model.adapter_names == list(self.known)


@pytest.fixture(scope="module")
def driven(checkpoints):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    megatrain.initialize(
        mode="driver", global_device_mesh=DeviceMesh(tp=2), platform="cpu", fork_ranks=True
    )
    Machine.base = checkpoints("qwen3")
    Machine.model = megatrain.MegatronModel(
        str(Machine.base), mixed_precision="no", max_loras=2, max_cpu_loras=1
    )
    yield
    megatrain.shutdown()


@pytest.mark.usefixtures("driven")
@pytest.mark.timeout(600)
def test_any_order_of_commands_does_what_peft_does():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
