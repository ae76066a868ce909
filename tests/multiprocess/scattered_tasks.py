"""What ranks do for test_scattered: passes as the bus brings them, with and without all rows."""

from dataclasses import replace
from typing import Any

import numpy as np

from megatrain.api.session import current_session
from megatrain.bus.codec import decode, encode
from megatrain.bus.commands import (
    AddAdapter,
    ForwardBackward,
    ForwardBackwardMany,
    OpenModel,
    SetLoss,
)
from megatrain.types import AdapterBatch
from tests.multiprocess.data import random_batch
from tests.multiprocess.loss_tasks import call_inputs, pairs
from tests.multiprocess.tasks import LORA, error_of


def _host(folder: Any) -> Any:
    from megatrain.bus.model_host import ModelHost

    opened = OpenModel(model_id=str(folder), options={"mixed_precision": "no"})
    host = ModelHost(opened, current_session())
    for name in ("a", "b"):
        host.run(AddAdapter(adapter=name, lora=LORA))
    host.run(SetLoss(adapter="b", spec="GRPOLoss", options={}))
    return host


def _arrays(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: np.asarray(value) for key, value in datum.items()} for datum in batch]


def _scattered(command: Any, host: Any) -> Any:
    """Return a command as this rank gets it."""
    from megatrain.bus.scattered import joined, split

    groups = current_session().groups
    parts = split(command, host)
    assert parts is not None
    head = decode(encode(parts[0]))
    return joined(head, parts[1] if groups.rank == 0 else None, groups)


def passes(folder: Any) -> Any:
    """Return the results of each pass, whole and scattered, and the bytes that were received."""
    host = _host(folder)
    batch = pairs(seed=1, num_pairs=20)
    given = call_inputs(batch)
    columns = {key: given[key] for key in ("old_logps", "advantages")}
    plain, policy = _arrays(batch), _arrays(batch)
    many = [AdapterBatch("a", plain), AdapterBatch("b", policy, columns)]
    commands = {
        "plain": ForwardBackward(adapter="a", inputs=plain),
        "policy": ForwardBackward(adapter="b", inputs=policy, loss_inputs=columns),
        "many": ForwardBackwardMany(batches=many),
    }
    outputs, received = {}, 0
    for name, command in commands.items():
        scattered = _scattered(command, host)
        outputs[name] = tuple(_result(host.run(each)) for each in (command, scattered))
        if name == "plain":
            received = scattered.inputs.num_received
    return {"outputs": outputs, "received": received, "total": len(encode(plain))}


def _result(value: Any) -> Any:
    each = list(value.values()) if isinstance(value, dict) else [value]
    return [x for one in each for x in one.logps], [one.loss for one in each]


def errors(folder: Any) -> Any:
    """Return the error of bad rows, whole and scattered."""
    host = _host(folder)
    batch = _arrays(random_batch(8, seed=1))
    wide = [dict(datum) for datum in batch]
    wide[5]["input_ids"] = wide[5]["input_ids"] + 10_000
    strange = [datum | {"color": np.asarray([1])} for datum in batch]
    cases = {"too large": wide, "unknown": strange}
    result = {}
    for name, inputs in cases.items():
        command = ForwardBackward(adapter="a", inputs=inputs)
        scattered = _scattered(replace(command), host)
        result[name] = tuple(
            error_of(lambda each=each: host.run(each)) for each in (command, scattered)
        )
    assert host.run(ForwardBackward(adapter="a", inputs=batch)).loss > 0
    return result
