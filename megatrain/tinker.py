"""This project's data for Tinker's client, and back: so templates and datasets feed it.

The two count positions differently.  Labels of an InputFeature stand at their own token, and the
shift by one happens inside; a Datum has it in the data: its input lacks the last token, and target
i is what follows input token i.  What an InputFeature does not train on has weight, or advantage,
0 in a Datum.

log_points adds what only a client knows, its rewards, to the curves that the service shows.
"""

import importlib
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import numpy.typing as npt

from megatrain.errors import ConfigError, DataError
from megatrain.types import IGNORED_LABEL, InputFeature

if TYPE_CHECKING:
    from tinker import Datum, ServiceClient, TrainingClient

_POLICY = ("importance_sampling", "ppo", "cispo", "gspo")
_LOSSES = ("cross_entropy", *_POLICY)
_NAMES = {"old_logps": "logprobs"}
"""Tinker's names for loss inputs, where they differ."""
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}
_TAKEN = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("old_logps", "advantages"),
    "ppo": ("old_logps", "advantages", "clip_low_threshold", "clip_high_threshold"),
    "cispo": ("old_logps", "advantages", "clip_low_threshold", "clip_high_threshold"),
    "gspo": (
        "old_logps",
        "advantages",
        "clip_low_threshold",
        "clip_high_threshold",
        "sequence_ratio_mask",
    ),
}
_KEPT = ("clip_low_threshold", "clip_high_threshold")
"""Inputs that say nothing about what is trained on: they stay as they are on ignored labels."""

Arrays = dict[str, npt.NDArray[Any]]


def input_feature_to_datum(
    feature: InputFeature,
    *,
    loss_fn: str = "cross_entropy",
    loss_inputs: Mapping[str, Any] | None = None,
) -> "Datum":
    """Return a feature of one sequence as a tinker.Datum for `loss_fn`.

    `loss_inputs` are this datum's, under this project's names (weights, old_logps, advantages...):
    one number, one for each of input_ids, or one for each label that is trained on.  Raises
    DataError for what a Datum cannot hold, ConfigError where tinker is not installed.
    """
    if loss_fn not in _LOSSES:
        raise DataError(
            f"loss_fn {loss_fn!r} cannot leave labels out; it must be one of {', '.join(_LOSSES)}",
            hint="dro counts every position: build its data yourself",
        )
    input_ids, labels = _sequence(feature)
    trained = labels != IGNORED_LABEL
    given = _given(loss_fn, loss_inputs or {}, trained)
    # A target that is not trained on must still be a token: the one that really follows.
    columns: Arrays = {"target_tokens": np.where(trained, labels, input_ids)}
    if loss_fn == "cross_entropy":
        columns["weights"] = given.pop("weights", np.ones(len(labels), dtype=np.float32)) * trained
    if loss_fn == "gspo":
        mask = given.pop("sequence_ratio_mask", np.ones(len(labels), dtype=np.float32))
        columns["sequence_ratio_mask"] = mask * trained
    columns |= {_NAMES.get(name, name): array for name, array in given.items()}
    types = _client()
    datum: Datum = types.Datum(
        model_input=types.ModelInput.from_ints(input_ids[:-1].tolist()),
        loss_fn_inputs={
            name: types.TensorData.from_numpy(_typed(name, column[1:]))
            for name, column in columns.items()
        },
    )
    return datum


def datum_to_input_feature(datum: "Datum") -> tuple[InputFeature, Arrays]:
    """Return a tinker.Datum as a feature and its loss inputs, one number for each of input_ids.

    Targets of weight 0 become ignored labels, and weights that are all 0 or 1 say no more.  The
    last of input_ids, which nothing reads, is the last target.  Raises DataError for images, and
    for several targets a position.
    """
    tokens = _text(datum)
    columns = {name: tensor.to_numpy() for name, tensor in _dense(datum).items()}
    targets = columns.pop("target_tokens", None)
    if targets is None or targets.shape != tokens.shape or not len(tokens):
        raise DataError(
            f"target_tokens must have one number for each of {len(tokens)} input tokens, at least 1"
        )
    weights = columns.get("weights")
    trained = np.ones(len(tokens), dtype=bool) if weights is None else weights != 0
    if weights is not None and np.isin(weights, (0, 1)).all():
        del columns["weights"]
    labels = np.where(trained, targets, IGNORED_LABEL)
    feature: InputFeature = {
        "input_ids": [*tokens.tolist(), int(targets[-1])],
        "labels": [IGNORED_LABEL, *labels.tolist()],
    }
    return feature, {_OURS.get(name, name): _aligned(name, columns[name]) for name in columns}


def log_points(
    run: str,
    step: int,
    values: Mapping[str, float],
    *,
    base_url: str | None = None,
    api_key: str | None = None,
) -> None:
    """Add values of a step to the curves of a run, which is a training client's model_id.

    Where the service is, and the key, are TINKER_BASE_URL's and TINKER_API_KEY's if they are not
    given.  Raises ConfigError without an address, DataError for what is no number or the service
    refuses, and httpx.TransportError if it does not answer.
    """
    if not np.isfinite(list(values.values())).all():
        raise DataError(f"values of a curve are finite numbers: {dict(values)}")
    address = base_url or os.environ.get("TINKER_BASE_URL")
    if not address:
        raise ConfigError("where is the service?", hint="give base_url, or set TINKER_BASE_URL")
    answer = httpx.post(
        f"{address.rstrip('/')}/api/console/runs/{run}/points",
        json={"step": step, "values": {name: float(value) for name, value in values.items()}},
        headers={"X-API-Key": api_key or os.environ.get("TINKER_API_KEY", "")},
        timeout=30.0,
    )
    if answer.is_error:
        raise DataError(f"the service took no points of step {step}: {_detail(answer)}")


def create_full_training_client(
    service: "ServiceClient",
    base_model: str,
    *,
    optimizer: Any = None,
    user_metadata: Mapping[str, str] | None = None,
) -> "TrainingClient":
    """Return a client that trains every parameter of a model that is served for it.

    The official client always asks for an adapter; the same request without a lora_config asks for
    all of the model.  `optimizer` is an OptimizerConfig of tinker's.  Raises what
    create_lora_training_client raises, and RequestFailedError while another run has the model.
    """
    types = _client()
    own = importlib.import_module("tinker.lib.public_interfaces.training_client")
    holder = service.holder
    number = holder.get_training_client_id()
    request = types.CreateModelRequest(
        session_id=holder.get_session_id(),
        model_seq_id=number,
        base_model=base_model,
        user_metadata=None if user_metadata is None else dict(user_metadata),
        optimizer_config=optimizer or types.AdamOptimizerConfig(),
    )

    async def create() -> "TrainingClient":
        began = time.time()
        with holder.aclient(own.ClientConnectionPoolType.TRAIN) as api:
            accepted = await api.models.create(request=request)
        made = await own._APIFuture(
            types.CreateModelResponse,
            holder,
            accepted,
            request_start_time=began,
            request_type="CreateModel",
        ).result_async()
        info = await own.fetch_training_info(holder, made.model_id)
        client: TrainingClient = own.TrainingClient(
            holder, model_seq_id=number, model_id=made.model_id, info=info
        )
        return client

    return holder.run_coroutine_threadsafe(create()).result()


def _detail(answer: httpx.Response) -> str:
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP {answer.status_code}"
    return str(detail)


def _sequence(feature: InputFeature) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return tokens and labels [L] of one sequence, checked; the first label is ignored."""
    input_ids = np.asarray(feature["input_ids"], dtype=np.int64)
    given = feature.get("labels")
    labels = input_ids.copy() if given is None else np.array(given, dtype=np.int64)
    if input_ids.ndim != 1 or len(input_ids) < 2 or labels.shape != input_ids.shape:
        raise DataError(
            f"a datum needs at least 2 tokens and as many labels: got input_ids of shape"
            f" {list(input_ids.shape)}, labels of {list(labels.shape)}"
        )
    lengths, positions = feature.get("lengths"), feature.get("position_ids")
    if (lengths is not None and len(lengths) > 1) or (
        positions is not None and list(positions) != list(range(len(input_ids)))
    ):
        raise DataError(
            "a feature that packs several sequences is no datum",
            hint="convert each sequence before packing",
        )
    labels[0] = IGNORED_LABEL
    return input_ids, labels


def _given(loss_fn: str, inputs: Mapping[str, Any], trained: npt.NDArray[np.bool_]) -> Arrays:
    """Return loss inputs by this project's names, [L] each."""
    unknown = sorted(inputs.keys() - set(_TAKEN[loss_fn]))
    if unknown:
        taken = ", ".join(_TAKEN[loss_fn])
        raise DataError(f"{loss_fn} does not take {', '.join(unknown)}; it takes: {taken}")
    missing = sorted({"old_logps", "advantages"} - inputs.keys()) if loss_fn in _POLICY else []
    if missing:
        raise DataError(f"{loss_fn} needs {', '.join(missing)}")
    result = {}
    for name, value in inputs.items():
        column = _column(name, value, trained)
        result[name] = column if name in _KEPT else np.where(trained, column, np.float32(0))
    return result


def _column(name: str, value: Any, trained: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    array = np.asarray(value, dtype=np.float32)
    if array.ndim == 0 or array.shape == trained.shape:
        return np.broadcast_to(array, trained.shape)
    count = int(trained.sum())
    if array.shape != (count,) or name in _KEPT:
        raise DataError(
            f"{name} must be one number, or one for each of {len(trained)} tokens or {count}"
            f" labels: got shape {list(array.shape)}"
        )
    result = np.zeros(len(trained), dtype=np.float32)
    result[trained] = array
    return result


def _typed(name: str, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return column.astype(np.int64 if name == "target_tokens" else np.float32)


def _text(datum: "Datum") -> npt.NDArray[np.int64]:
    try:
        return np.array(datum.model_input.to_ints(), dtype=np.int64)
    except ValueError as error:
        raise DataError("a datum with images or audio is no feature: text alone is") from error


def _dense(datum: "Datum") -> Mapping[str, Any]:
    for name, tensor in datum.loss_fn_inputs.items():
        if tensor.sparse_crow_indices is not None or len(tensor.shape or [0]) > 1:
            raise DataError(f"{name} has several numbers a position, which no feature holds")
    return datum.loss_fn_inputs


def _aligned(name: str, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a column with an entry for the first token, too; one number stays one."""
    return column if column.size == 1 and name in _KEPT else np.insert(column, 0, 0)


def _client() -> Any:
    try:
        return importlib.import_module("tinker.types")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a Datum is made by Tinker's client, which is not installed",
            hint="pip install tinker",
        ) from error
