"""Every public method of the official client's classes, called against a live service.

Methods are found by inspection: one that is new has no entry in CALLS, and the test fails.  A
method and its `_async` twin take the same arguments.
"""

import asyncio
import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import tinker
from tinker import types

from tests.service.offline import MODEL

RECORD = Path(__file__).with_name("sdk_table.json")
LIMIT_S = 60.0
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class World:
    """A client with a run, a sampler and checkpoints to work on."""

    service: Any
    training: Any = field(init=False)
    sampling: Any = field(init=False)
    rest: Any = field(init=False)

    def __post_init__(self) -> None:
        self.training = self.service.create_lora_training_client(base_model=MODEL, rank=2).result()
        self.sampling = self.training.save_weights_and_get_sampling_client().result()
        self.rest = self.service.create_rest_client()
        self._names = (f"saved-{number}" for number in itertools.count())

    @property
    def run(self) -> str:
        return str(self.training.get_info().model_id)

    @property
    def session(self) -> str:
        return self.run.split(":")[0]

    @property
    def sampler_id(self) -> str:
        return str(self.rest.get_session(self.session).result(LIMIT_S).sampler_ids[-1])

    def name(self) -> str:
        return next(self._names)

    def state(self) -> str:
        return str(self.training.save_state(self.name()).result(LIMIT_S).path)

    def weights(self) -> str:
        return str(self.training.save_weights_for_sampler(self.name()).result(LIMIT_S).path)

    def external(self) -> str:
        return str(self.training.save_weights_external(self.name()).result(LIMIT_S).path)


def datum() -> types.Datum:
    """Return one datum of cross_entropy."""
    targets = types.TensorData(data=[4, 5, 6, 7], dtype="int64", shape=[4])
    return types.Datum(
        model_input=types.ModelInput.from_ints([3, 4, 5, 6]),
        loss_fn_inputs={"target_tokens": targets},
    )


def call(*args: Any, **options: Any) -> Arguments:
    """Return arguments."""
    return args, options


def mean_loss(data: Any, logprobs: Any) -> Any:
    """Be a loss of the user's own."""
    loss = sum(-each.mean() for each in logprobs)
    return loss, {"mean": float(loss)}


def prompt() -> types.ModelInput:
    """Return a few tokens."""
    return types.ModelInput.from_ints([3, 4, 5, 6])


def hours() -> tuple[datetime, datetime]:
    """Return the bounds of the last day, at full hours."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return end - timedelta(days=1), end


NOTHING = call
SAMPLED = types.SamplingParams(max_tokens=4, seed=1)
# What a method is called with; made when its turn comes, for what it deletes must be there.
CALLS: dict[str, Callable[[World], Arguments]] = {
    "ServiceClient.close": lambda w: call("success"),
    "ServiceClient.copy_weights": lambda w: call(w.state()),
    "ServiceClient.create_custom_loss": lambda w: call(
        lambda logprobs, target_tokens: -logprobs.sum(), {"logprobs": 1, "target_tokens": 1}
    ),
    "ServiceClient.create_lora_training_client": lambda w: call(base_model=MODEL, rank=2),
    "ServiceClient.create_rest_client": lambda w: NOTHING(),
    "ServiceClient.create_sampling_client": lambda w: call(base_model=MODEL),
    "ServiceClient.create_training_client_from_state": lambda w: call(w.state()),
    "ServiceClient.create_training_client_from_state_with_optimizer": lambda w: call(w.state()),
    "ServiceClient.get_console_url": lambda w: NOTHING(),
    "ServiceClient.get_server_capabilities": lambda w: NOTHING(),
    "ServiceClient.get_telemetry": lambda w: NOTHING(),
    "TrainingClient.create_sampling_client": lambda w: call(w.weights()),
    "TrainingClient.forward": lambda w: call([datum()], "cross_entropy"),
    "TrainingClient.forward_backward": lambda w: call([datum()], "cross_entropy"),
    "TrainingClient.forward_backward_custom": lambda w: call([datum()], mean_loss),
    "TrainingClient.get_console_url": lambda w: NOTHING(),
    "TrainingClient.get_info": lambda w: NOTHING(),
    "TrainingClient.get_telemetry": lambda w: NOTHING(),
    "TrainingClient.get_tokenizer": lambda w: NOTHING(),
    "TrainingClient.load_state": lambda w: call(w.state()),
    "TrainingClient.load_state_with_optimizer": lambda w: call(w.state()),
    "TrainingClient.optim_step": lambda w: call(types.AdamParams(learning_rate=1e-3)),
    "TrainingClient.save_state": lambda w: call(w.name()),
    "TrainingClient.save_weights_and_get_sampling_client": lambda w: NOTHING(),
    "TrainingClient.save_weights_external": lambda w: call(w.name()),
    "TrainingClient.save_weights_for_sampler": lambda w: call(w.name()),
    "SamplingClient.compute_logprobs": lambda w: call(prompt()),
    "SamplingClient.create": lambda w: call(w.service.holder, base_model=MODEL),
    "SamplingClient.from_sampler_handle": lambda w: call(w.sampling.get_sampler_handle()),
    "SamplingClient.get_base_model": lambda w: NOTHING(),
    "SamplingClient.get_sampler_handle": lambda w: NOTHING(),
    "SamplingClient.get_telemetry": lambda w: NOTHING(),
    "SamplingClient.get_tokenizer": lambda w: NOTHING(),
    "SamplingClient.on_queue_state_change": lambda w: call(_queue_state(), None),
    "SamplingClient.sample": lambda w: call(prompt(), 2, SAMPLED, include_prompt_logprobs=True),
    "RestClient.assign_session_project": lambda w: call(w.session, "default"),
    "RestClient.copy_weights": lambda w: call(w.state(), "default"),
    "RestClient.delete_checkpoint": lambda w: call(w.run, "/".join(w.state().split("/")[-2:])),
    "RestClient.delete_checkpoint_from_tinker_path": lambda w: call(w.state()),
    "RestClient.export_session_trace": lambda w: call(w.session),
    "RestClient.get_audit_log": lambda w: NOTHING(),
    "RestClient.get_billing_usage": lambda w: call(*hours()),
    "RestClient.get_current_checkpoint_storage_usage": lambda w: NOTHING(),
    "RestClient.get_external_weights_urls": lambda w: call(w.external()),
    "RestClient.get_sampler": lambda w: call(w.sampler_id),
    "RestClient.get_server_capabilities": lambda w: NOTHING(),
    "RestClient.get_session": lambda w: call(w.session),
    "RestClient.get_telemetry": lambda w: NOTHING(),
    "RestClient.get_training_run": lambda w: call(w.run),
    "RestClient.get_training_run_by_tinker_path": lambda w: call(w.state()),
    "RestClient.get_weights_info_by_tinker_path": lambda w: call(w.state()),
    "RestClient.list_checkpoints": lambda w: call(w.run),
    "RestClient.list_sessions": lambda w: NOTHING(),
    "RestClient.list_training_runs": lambda w: NOTHING(),
    "RestClient.list_user_checkpoints": lambda w: NOTHING(),
    "RestClient.publish_checkpoint_from_tinker_path": lambda w: call(w.state()),
    "RestClient.search_sessions": lambda w: call(types.SessionSearchRequest()),
    "RestClient.set_checkpoint_ttl_from_tinker_path": lambda w: call(w.state(), 7200),
    "RestClient.unpublish_checkpoint_from_tinker_path": lambda w: call(w.state()),
    "RestClient.whoami": lambda w: NOTHING(),
    "AdminClient.get_audit_log": lambda w: NOTHING(),
    "AdminClient.get_billing_usage": lambda w: call(*hours()),
    "AdminClient.get_current_checkpoint_storage_usage": lambda w: NOTHING(),
    "AdminClient.get_telemetry": lambda w: NOTHING(),
    "APIFuture.result": lambda w: call(LIMIT_S),
    "APIFuture.coroutine": lambda w: NOTHING(),
    "APIFuture.future": lambda w: NOTHING(),
}
CLASSES = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    tinker.AdminClient,
    tinker.APIFuture,
)


def _queue_state() -> Any:
    from tinker.lib.api_future_impl import QueueState

    return QueueState.ACTIVE


def public_methods() -> list[str]:
    """Return `Class.method` of all; properties are no methods."""
    return [
        f"{each.__name__}.{name}"
        for each in CLASSES
        for name, member in inspect.getmembers(each)
        if not name.startswith("_") and callable(member)
    ]


def arguments_of(method: str) -> Callable[[World], Arguments] | None:
    """Return what makes the arguments of a method or of its twin; None if nobody wrote it."""
    return CALLS.get(method) or CALLS.get(method.removesuffix("_async"))


def run_table(connect: Callable[[], Any], methods: list[str]) -> dict[str, str]:
    """Call all methods; return `works` or `refused: REASON` for each.

    `connect` returns a new ServiceClient.
    """
    world = World(connect())
    # What ends a client comes on one of its own.
    return {each: _outcome(_target(world, each, connect), each, world) for each in methods}


def _target(world: World, method: str, connect: Callable[[], Any]) -> Any:
    kind = method.split(".")[0]
    if method == "ServiceClient.close":
        return connect()
    return {
        "ServiceClient": lambda: world.service,
        "TrainingClient": lambda: world.training,
        "SamplingClient": lambda: world.sampling,
        "RestClient": lambda: world.rest,
        "AdminClient": lambda: tinker.AdminClient(world.service.holder),
        "APIFuture": lambda: world.training.forward([datum()], "cross_entropy"),
    }[kind]()


def _outcome(target: Any, method: str, world: World) -> str:
    made = arguments_of(method)
    assert made is not None, method
    args, options = made(world)
    try:
        asyncio.run(asyncio.wait_for(_finish(target, method.split(".")[1], args, options), LIMIT_S))
    except Exception as error:  # noqa: BLE001 - the table says which
        return f"refused: {_reason(error, world)}"
    return "works"


async def _finish(target: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Call a method, then await or ask for results until one is no future any more."""
    got = await asyncio.to_thread(getattr(target, name), *args, **options)
    while True:
        if inspect.isawaitable(got):
            got = await got
        elif hasattr(got, "result") and callable(got.result):
            got = await asyncio.to_thread(got.result, LIMIT_S)
        else:
            return


def _reason(error: Exception, world: World) -> str:
    """Return the first line of what was said, without names that differ from run to run."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].replace(world.session, 'SESSION')[:160]}"


def markdown(record: dict[str, str]) -> str:
    """Return the table: a row for each method, with its `_async` twin."""
    rows = ["| Method | Plain | `_async` |", "|---|---|---|"]
    for name, outcome in record.items():
        base = name.removesuffix("_async")
        if base != name and base in record:
            continue
        rows.append(f"| `{base}` | {outcome} | {record.get(f'{base}_async', '')} |")
    return "\n".join(rows) + "\n"


def read_record() -> dict[str, dict[str, str]]:
    """Return the record of the last time that it was written, by kind: methods, commands."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}  # type: ignore[no-any-return]
