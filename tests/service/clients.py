"""Clients of the official SDK that train and sample at once, each as a thread with its own adapter.

What a client does depends on its seed alone, so that two runs can be compared.
"""

import random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import numpy as np
import tinker
from safetensors.numpy import load
from tinker import types

from tests.service.sdk_clients import client
from tests.service.server import NAME, Server

STEPS = 5
SAVED_AT = 2
"""The step before which a client saves its state and loads it again."""
SAMPLED_AT = (1, 3)
"""Steps before which it samples from what it has trained."""
LEARNING_RATE = 1e-2


@dataclass
class Trained:
    """What a client has got."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    adapter: dict[str, np.ndarray] = field(default_factory=dict)


class Clients:
    """Some clients of one service, while they work."""

    def __init__(self, server: Server, count: int, *, first_seed: int = 0) -> None:
        self._server = server
        self.trained: dict[int, Trained] = {}
        self.failures: dict[int, str] = {}
        self.steps = 0
        self._state = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, args=(seed,), daemon=True)
            for seed in range(first_seed, first_seed + count)
        ]

    def start(self) -> None:
        """Let all of them begin."""
        for thread in self._threads:
            thread.start()

    def wait_for_steps(self, count: int, timeout_s: float = 240.0) -> None:
        """Wait until all of them together have done so many steps, or one has failed."""
        with self._state:
            self._state.wait_for(lambda: self.steps >= count or self.failures, timeout_s)
        assert self.steps >= count, self.failures

    def join(self, timeout_s: float = 400.0) -> dict[int, Trained]:
        """Wait until all have finished, and return what each has; fail with what one says."""
        limit = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        assert not self.failures, "\n".join(self.failures.values())
        assert not any(thread.is_alive() for thread in self._threads), "a client hangs"
        return self.trained

    def _work(self, seed: int) -> None:
        try:
            found = train(self._server, seed, self._stepped)
        except BaseException:  # noqa: BLE001 - the test says what it was
            with self._state:
                self.failures[seed] = traceback.format_exc()
                self._state.notify_all()
        else:
            self.trained[seed] = found

    def _stepped(self) -> None:
        with self._state:
            self.steps += 1
            self._state.notify_all()


def train(server: Server, seed: int, stepped: Callable[[], None]) -> Trained:
    """Train an adapter, saving, loading and sampling in between."""
    service = client(server)
    training = service.create_lora_training_client(base_model=NAME, rank=4, seed=seed).result()
    found, draw = Trained(), random.Random(seed)
    for step in range(STEPS):
        if step == SAVED_AT:
            path = training.save_state("middle").result().path
            training.load_state_with_optimizer(path).result()
        if step in SAMPLED_AT:
            found.samples.append(_sample(training, seed))
        data = [datum(draw, 8 + draw.randrange(24)) for _ in range(2)]
        passed = training.forward_backward(data, "cross_entropy")
        moved = training.optim_step(types.AdamParams(learning_rate=LEARNING_RATE))
        found.losses.append(passed.result().metrics["loss:sum"])
        found.norms.append(moved.result().metrics["grad_norm"])
        stepped()
    path = training.save_weights_external("final").result().path
    found.adapter = download(service, path)
    service.close("success").result()
    return found


def _sample(training: tinker.TrainingClient, seed: int) -> list[int]:
    sampler = training.save_weights_and_get_sampling_client()
    params = types.SamplingParams(max_tokens=16, seed=seed, temperature=0.0, stop=[])
    prompt = types.ModelInput.from_ints([7, 8, 9, 10 + seed])
    return list(sampler.sample(prompt, 1, params).result().sequences[0].tokens)


def datum(draw: random.Random, size: int) -> types.Datum:
    """Return random tokens, each of which is to be followed by the next."""
    ids = [draw.randrange(5, 500) for _ in range(size + 1)]
    targets = types.TensorData(data=ids[1:], dtype="int64", shape=[size])
    return types.Datum(
        model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": targets}
    )


def download(service: tinker.ServiceClient, path: str) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint, by name, from the URLs that the service gives."""
    urls = service.create_rest_client().get_external_weights_urls(path).result().urls
    with httpx.Client(timeout=60) as http:
        return load(http.get(urls["adapter_model.safetensors"]).raise_for_status().content)
