"""What each public method of the official client is called with.

A method and its `_async` twin take the same arguments.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tinker import types

from tests.service.offline import MODEL

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


def surprise(logprobs: Any, target_tokens: Any) -> Any:
    """Be a loss that can be traced."""
    loss = -logprobs.sum()
    return loss, {"custom/surprise:sum": loss}


def prompt() -> types.ModelInput:
    """Return a few tokens."""
    return types.ModelInput.from_ints([3, 4, 5, 6])


def hours() -> tuple[datetime, datetime]:
    """Return the bounds of the last day, at full hours."""
    end = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return end - timedelta(days=1), end


def _queue_state() -> Any:
    from tinker.lib.api_future_impl import QueueState

    return QueueState.ACTIVE


NOTHING = call
SAMPLED = types.SamplingParams(max_tokens=4, seed=1)
# What a method is called with; made when its turn comes, for what it deletes must be there.
CALLS: dict[str, Callable[[World], Arguments]] = {
    "ServiceClient.close": lambda w: call("success"),
    "ServiceClient.copy_weights": lambda w: call(w.state()),
    "ServiceClient.create_custom_loss": lambda w: call(
        surprise, {"logprobs": 1, "target_tokens": 1}
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
