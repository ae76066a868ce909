"""What ranks do for test_inputs: rows as datasets give them, good and bad."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import megatrain
from megatrain.api.session import current_session
from tests.multiprocess.data import random_batch
from tests.multiprocess.loss_tasks import label_counts, pairs
from tests.multiprocess.tasks import error_of, make_model


class Row(Mapping):
    """A LazyRow that knows whether it was read."""

    numbers = ()

    def __init__(self, index: int, datum: dict[str, Any], lie: int = 0) -> None:
        self.key, self.num_tokens = f"row {index}", len(datum["input_ids"]) + lie
        self.num_labels = label_counts([datum])[0]
        self.datum, self.was_read = datum, False

    def __getitem__(self, key: str) -> Any:
        self.was_read = True
        return self.datum[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.datum)

    def __len__(self) -> int:
        return len(self.datum)


class Broken(Row):
    """A row whose file is gone for one rank."""

    def __getitem__(self, key: str) -> Any:
        if current_session().groups.rank == current_session().groups.mesh.world_size - 1:
            raise OSError("the file is gone")
        return super().__getitem__(key)


def packed(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row that holds a whole batch."""
    return {
        "input_ids": [i for datum in batch for i in datum["input_ids"]],
        "labels": [i for datum in batch for i in datum["labels"]],
        "position_ids": [i for datum in batch for i in range(len(datum["input_ids"]))],
        "lengths": [len(datum["input_ids"]) for datum in batch],
    }


def row_report(folder: Any) -> dict[str, Any]:
    """Return the same batch's results as plain data, as a packed row, and as lazy rows."""
    model = make_model(folder)
    batch = random_batch(6, seed=3)
    rows = [Row(index, datum) for index, datum in enumerate(batch)]
    plain = model.forward_only(inputs=batch)
    whole = model.forward_only(inputs=[packed(batch)])
    lazy = model.forward_only(inputs=rows)
    return {
        "loss": [plain.loss, whole.loss, lazy.loss],
        "logps": [np.concatenate(plain.logps), whole.logps[0], np.concatenate(lazy.logps)],
        "read": [row.was_read for row in rows],
    }


def refusals(folder: Any) -> dict[str, Any]:
    """Return the error of each bad call, and the loss of a good one after all of them."""
    model = make_model(folder)
    batch = pairs()
    counts = label_counts(batch)

    def attempt(loss: str, inputs: Any = batch, **given: Any) -> Any:
        model.set_loss(loss)
        return error_of(lambda: model.forward_backward(inputs=inputs, **given))

    ones = [1.0] * len(batch)
    errors = {
        "unknown": attempt("CrossEntropyLoss", advantages=ones),
        "missing": attempt("GRPOLoss"),
        "too few": attempt("GRPOLoss", advantages=ones[:-1]),
        "wrong length": attempt("GRPOLoss", advantages=[[1.0] * (n + 1000) for n in counts]),
        "not finite": attempt("GRPOLoss", advantages=[float("nan"), *ones[1:]]),
        "half": attempt("GRPOLoss", advantages=ones, old_logps=[[0.0] * n for n in counts[:1]]),
        "odd": attempt("SimPOLoss", inputs=batch[:3]),
        "packed": attempt("SimPOLoss", inputs=[packed(batch[:2]), batch[2]]),
        "teacher": attempt(
            "DistillationLoss",
            teacher_tokens=[[[512]] * n for n in counts],
            teacher_logps=[[[-1.0]] * n for n in counts],
        ),
        "lie": attempt("CrossEntropyLoss", inputs=[Row(0, batch[0], lie=1)]),
        "positions": attempt(
            "CrossEntropyLoss", inputs=[{**packed(batch), "position_ids": [0, 2, 1]}]
        ),
        "size": attempt("CrossEntropyLoss", micro_batch_size=0),
        "twice": attempt(
            "DistillationLoss",
            teacher_tokens=[[[3, 3]] * n for n in counts],
            teacher_logps=[[[-1.0, -1.0]] * n for n in counts],
        ),
        "scalar": attempt("GRPOLoss", advantages=np.array(1.0)),
        "unread": attempt("CrossEntropyLoss", inputs=[Broken(i, d) for i, d in enumerate(batch)]),
        "name": error_of(lambda: model.set_loss("GPROLoss")),
        "option": error_of(lambda: model.set_loss("GRPOLoss", epsilom=0.1)),
    }
    model.set_loss("CrossEntropyLoss")
    return errors, model.forward_backward(inputs=batch).loss, model.clip_grad_norm(0)


def good(folder: Any) -> Any:
    """Return what the good call of `refusals` gives on its own."""
    model = make_model(folder)
    return model.forward_backward(inputs=pairs()).loss, model.clip_grad_norm(0)


def with_dropout(folder: Any) -> Any:
    """Return losses of passes with dropout."""
    lora = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    model = make_model(folder, lora)
    model.set_optimizer("SGD", lr=0.0)
    batch = pairs()
    losses = [model.forward_backward(inputs=batch).loss for _ in range(2)]
    model.clip_grad_and_step()
    return [*losses, model.forward_backward(inputs=batch).loss]


def _training(base: Any, rows: Any, *, lazy: bool) -> tuple[Any, Any]:
    """Return a model and a loader of conversations."""
    dataset = megatrain.Dataset(megatrain.DatasetMeta(str(rows)))
    dataset.set_template("Template", model_id=str(base), max_length=512)
    model = make_model(base)
    model.set_optimizer("AdamW", lr=1e-4)
    return model, megatrain.DataLoader(dataset.encode(lazy=lazy), batch_size=16)


def wait_share(base: Any, rows: Any, lazy: bool) -> float:
    """Return the share of two epochs' time that went by waiting for data, after the first steps."""
    model, loader = _training(base, rows, lazy=lazy)
    seconds = waited = 0.0
    for _ in range(2):
        start, before = time.perf_counter(), loader.wait_seconds
        for number, batch in enumerate(loader):
            model.forward_backward(inputs=batch)
            model.clip_grad_and_step()
            if number == 1:  # threads and kernels have been warmed up
                start, before = time.perf_counter(), loader.wait_seconds
        seconds += time.perf_counter() - start
        waited += loader.wait_seconds - before
    return waited / seconds


def rows_read(base: Any, rows: Any) -> Any:
    """Return which rows of a later batch were read before the model saw it, and after."""
    model, loader = _training(base, rows, lazy=False)
    batches = iter(loader)
    for _ in range(6):
        model.forward_backward(inputs=next(batches))
    batch = next(batches)
    ahead = [row.is_read for row in batch]
    model.forward_backward(inputs=batch)
    return ahead, [row.is_read for row in batch]
