"""What ranks do for test_losses: one pass of every kind of loss, and what came of it."""

from typing import Any

import numpy as np
import torch

from megatrain.train.loss import Loss, LossBatch
from megatrain.train.losses.likelihood import CrossEntropyLoss
from tests.multiprocess.tasks import error_of, make_model, reduced_gradient


def pairs(seed: int = 0, num_pairs: int = 3) -> list[dict[str, Any]]:
    """Return chosen and rejected data that begin alike, one after the other."""
    rng = np.random.default_rng(seed)
    batch = []
    for _ in range(num_pairs):
        prompt = rng.integers(0, 512, rng.integers(3, 20)).tolist()
        for _ in range(2):
            answer = rng.integers(0, 512, rng.integers(2, 30)).tolist()
            batch.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return batch


def hard_pairs() -> list[dict[str, Any]]:
    """Return pairs of which one is without labels: a datum of one token, one that is all prompt."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, 512, 9).tolist()
    return [
        {"input_ids": prompt[:1], "labels": prompt[:1]},
        {"input_ids": prompt, "labels": [-100] * 9},
        *pairs(seed=1, num_pairs=3),
    ]


def hard_losses(folder: Any, losses: list[tuple[str, dict[str, Any], list[str]]]) -> list[Any]:
    """Return, for each loss, loss and statistics on hard_pairs, packed in two ways."""
    model = make_model(folder)
    batch = hard_pairs()
    inputs = call_inputs(batch)
    reports = []
    for name, options, wanted in losses:
        model.set_loss(name, **options)
        given = {key: inputs[key] for key in wanted}
        outputs = [
            model.forward_only(inputs=batch, micro_batch_size=size, **given) for size in (2, 8)
        ]
        reports.append([(output.loss, dict(output.statistics)) for output in outputs])
    return reports


def label_counts(batch: list[dict[str, Any]]) -> list[int]:
    """Return the number of labels of each datum."""
    return [sum(label != -100 for label in datum["labels"][1:]) for datum in batch]


def call_inputs(batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return plausible per-call inputs of every name, drawn from a fixed seed."""
    rng = np.random.default_rng(7)
    counts = label_counts(batch)
    return {
        "old_logps": [(-6 + 0.3 * rng.standard_normal(n)).tolist() for n in counts],
        "ref_logps": [(-6 + 0.1 * rng.standard_normal(n)).tolist() for n in counts],
        "advantages": [float(rng.standard_normal()) for _ in counts],
        "label": [float(i % 2) for i in range(len(counts))],
        "kl": [0.1] * len(counts),
        "teacher_tokens": [
            (rng.integers(0, 128, (n, 4)) + 128 * np.arange(4)).tolist() for n in counts
        ],
        "teacher_logps": [np.log(rng.dirichlet(np.ones(8), n)[:, :4]).tolist() for n in counts],
    }


def loss_reports(folder: Any, losses: list[tuple[str, dict[str, Any], list[str]]]) -> list[Any]:
    """Return loss, statistics and the reduced gradient of each loss."""
    model = make_model(folder)
    batch = pairs()
    inputs = call_inputs(batch)
    reports = []
    for name, options, wanted in losses:
        model.set_loss(name, **options)
        given = {key: inputs[key] for key in wanted}
        output = model.forward_backward(inputs=batch, micro_batch_size=2, **given)
        reports.append((output.loss, dict(output.statistics), reduced_gradient(model)))
        model.zero_grad()
    return reports


def reward_report(
    folder: Any, steps: int, lora: dict[str, Any] | None = None, seed: int = 0
) -> Any:
    """Return scores, losses and what was trained by a reward model (all of it for no lora)."""
    model = make_model(folder, lora, task="reward")
    model.set_optimizer("AdamW", lr=3e-4)
    batch = pairs(seed)
    before = model.forward_only(inputs=batch[:3]).logps
    losses, accuracies = [], []
    for _ in range(steps):
        output = model.forward_backward(inputs=batch)
        losses.append(output.loss)
        accuracies.append(output.statistics["accuracy"])
        model.clip_grad_and_step()
    return before, losses, accuracies, model.get_state_dict()


def saved_reward_model(folder: Any, output_dir: str, lora: dict[str, Any] | None = None) -> Any:
    """Return scores of a trained reward model, saved to `output_dir/reward`."""
    model = make_model(folder, lora, task="reward")
    model.set_optimizer("AdamW", lr=1e-3)
    batch = pairs()
    model.forward_backward(inputs=batch)
    model.clip_grad_and_step()
    scores = [float(each[-1]) for each in model.forward_only(inputs=batch).logps]
    model.save("reward", output_dir)
    return scores


def broken(batch: Any) -> Any:
    """A loss that fails."""
    raise RuntimeError("on purpose")


class Constant(Loss):
    """A loss that does not depend on the model."""

    def __call__(self, batch: LossBatch) -> Any:
        return torch.tensor(1.0), {}


class BadBackward(Loss):
    """A loss whose backward fails."""

    def __call__(self, batch: LossBatch) -> Any:
        values = batch.logps_N.exp()
        loss = values.sum()
        values.detach().mul_(2.0)  # exp's backward needs its result as it was
        return loss, {}


class BadDivisor(CrossEntropyLoss):
    """A loss that cannot say what its sum is divided by."""

    def divisor(self, num_labels: Any) -> float:
        return float("nan")


def bad_losses(folder: Any) -> Any:
    """Return the errors of losses that fail late, and the gradient norm of a good call before."""
    model = make_model(folder)
    batch = pairs()
    model.forward_backward(inputs=batch)
    errors = {}
    for loss in (Constant, BadBackward, BadDivisor):
        model.set_loss(loss)
        errors[loss.__name__] = error_of(lambda: model.forward_backward(inputs=batch))
    return errors, model.clip_grad_norm(0)


def good_norm(folder: Any) -> float:
    """Return the gradient norm of the good call alone."""
    model = make_model(folder)
    model.forward_backward(inputs=pairs())
    return model.clip_grad_norm(0)


def failing_loss(folder: Any) -> Any:
    """Return the error of a loss that fails, and whether training goes on after it."""
    model = make_model(folder)
    batch = pairs()
    model.set_loss(broken)
    error = error_of(lambda: model.forward_backward(inputs=batch))
    model.set_loss("CrossEntropyLoss")
    return error, model.forward_backward(inputs=batch).loss
