"""What ranks do for test_resume: train, save, and go on elsewhere."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.multiprocess.data import Batch
from tests.multiprocess.loss_tasks import pairs
from tests.multiprocess.tasks import error_of, make_model

SCHEDULE = {"num_warmup_steps": 3, "num_training_steps": 20}


ADAMW = {"optimizer_cls": "AdamW", "lr": 1e-4, "weight_decay": 0.1}


def ready(
    folder: Any,
    lora: dict[str, Any],
    accumulate: int = 1,
    optimizer: dict[str, Any] = ADAMW,
) -> Any:
    """Return a model that trains an adapter (or, with an empty `lora`, everything) at lr 1e-4."""
    model = make_model(folder, lora, accumulate)
    model.set_optimizer(**optimizer)
    model.set_lr_scheduler("CosineWarmupScheduler", **SCHEDULE)
    return model


def steps(model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Train a call per batch; return every result, and what was trained at the end."""
    outputs, norms, rates = [], [], []
    for batch in batches:
        outputs.append(model.forward_backward(inputs=batch))
        norms.append(model.clip_grad_and_step())
        rates.append(model.calculate_metric()["lr"])
    return {
        "losses": [output.loss for output in outputs],
        "logps": [logps for output in outputs for logps in output.logps],
        "norms": norms,
        "rates": rates,
        "tensors": model.get_state_dict(),
    }


def straight(folder: Any, lora: dict[str, Any], batches: Sequence[Batch]) -> dict[str, Any]:
    """Train without a pause."""
    return steps(ready(folder, lora), batches)


def save_in_the_middle(
    folder: Any,
    lora: dict[str, Any],
    optimizer: dict[str, Any],
    batches: Sequence[Batch],
    pause: int,
    output_dir: Any,
) -> dict[str, Any]:
    """Train, save before batch number `pause`, train on; return results after the pause."""
    model = ready(folder, lora, optimizer=optimizer)
    steps(model, batches[:pause])
    path = model.save("half", output_dir, save_optimizer=True, consumed_train_samples=7 * pause)
    return steps(model, batches[pause:]) | {"path": path}


def go_on(folder: Any, path: Any, batches: Sequence[Batch], output_dir: Any) -> dict[str, Any]:
    """Resume in a model that has nothing set, save at once, train on."""
    model = make_model(folder, {})
    place = model.resume_from_checkpoint(path)
    again = model.save("again", output_dir, save_optimizer=True)
    return steps(model, batches) | {"place": place, "again": again}


def go_on_in_one_process(
    folder: Any,
    lora: dict[str, Any],
    batches: Sequence[Batch],
    pause: int,
    output_dir: Any,
    optimizer: dict[str, Any] = ADAMW,
) -> dict[str, Any]:
    """Train to the pause, save, train a second model on from there; also train straight on."""
    model = ready(folder, lora, optimizer=optimizer)
    steps(model, batches[:pause])
    path = model.save("half", output_dir, save_optimizer=True)
    fresh = ready(folder, lora, optimizer=optimizer)
    fresh.resume_from_checkpoint(path)
    return {
        "resumed": steps(fresh, batches[pause:]),
        "paused": steps(model, batches[pause:]),
        "straight": steps(ready(folder, lora, optimizer=optimizer), batches),
    }


def pause_between_calls(
    folder: Any, lora: dict[str, Any], batches: Sequence[Batch], output_dir: Any, reduce: bool
) -> dict[str, Any]:
    """Save when gradients of one call are there, two make a step; train on."""
    model = ready(folder, lora, accumulate=2)
    model.forward_backward(inputs=batches[0])
    if reduce:
        model.clip_grad_norm(0.5)
    else:
        model.clip_grad_and_step()
    return {"path": model.save("half", output_dir, save_optimizer=True)} | after_the_pause(
        model, batches, reduce
    )


def resume_between_calls(
    folder: Any, path: Any, batches: Sequence[Batch], reduce: bool
) -> dict[str, Any]:
    """Resume from there."""
    model = make_model(folder, {})
    model.resume_from_checkpoint(path)
    return after_the_pause(model, batches, reduce)


def after_the_pause(model: Any, batches: Sequence[Batch], reduce: bool) -> dict[str, Any]:
    """Finish the step that was begun."""
    if reduce:
        model.step()
        return {"norm": 0.0, "tensors": model.get_state_dict()}
    model.forward_backward(inputs=batches[1])
    return {"norm": model.clip_grad_and_step(), "tensors": model.get_state_dict()}


def two_saved_adapters(folder: Any, batches: Sequence[Batch], output_dir: Any) -> dict[str, Any]:
    """Train two adapters, save each, resume both in a model that has neither, train on."""
    kinds = {
        "a": {"r": 4, "target_modules": "all-linear"},
        "b": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    }
    model, fresh, result = make_model(folder, {}), make_model(folder, {}), {}
    for name, lora in kinds.items():
        model.add_adapter_to_model(name, lora)
        model.set_optimizer("AdamW", lr=1e-3, adapter_name=name)
    for name, batch in zip("aab", batches, strict=True):
        model.forward_backward(inputs=batch, adapter_name=name)
        model.clip_grad_and_step(adapter_name=name)
    for name in "ba":
        path = model.save(name, output_dir, save_optimizer=True, adapter_name=name)
        result[name] = fresh.resume_from_checkpoint(path, adapter_name=name)
    for each in (model, fresh):
        for name in "ab":
            each.forward_backward(inputs=batches[0], adapter_name=name)
            each.clip_grad_and_step(adapter_name=name)
    for name in "ab":
        result[f"{name} paused"] = model.get_state_dict(adapter_name=name)
        result[f"{name} resumed"] = fresh.get_state_dict(adapter_name=name)
    return result


def weights_and_position(folder: Any, batches: Sequence[Batch], output_dir: Any) -> dict[str, Any]:
    """Save a data position without the optimizer; resume where an optimizer is set."""
    model = ready(folder, {"r": 4, "target_modules": ["q_proj"]})
    steps(model, batches[:1])
    path = model.save("light", output_dir, consumed_train_samples=9)
    saved, fresh = model.get_state_dict(), ready(folder, {"r": 4, "target_modules": ["q_proj"]})
    place, trained = fresh.resume_from_checkpoint(path), fresh._trainer.trained["default"]
    counters = [s.optimizer_counters(trained.optimizer) for s in trained.gradients.shards]
    resumed = fresh.get_state_dict()
    return {"place": place, "counters": counters, "saved": saved, "resumed": resumed}


def refusals(folder: Any, other: Any, batch: Batch, output_dir: Any) -> dict[str, Any]:
    """Return the error of each resumption that must be refused, and whether it changed anything."""
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = ready(folder, lora)
    steps(model, [batch])
    path = model.save("good", output_dir, save_optimizer=True)
    sgd = make_model(folder, lora)
    sgd.set_optimizer("SGD", lr=1e-4)
    constant = make_model(folder, lora)
    constant.set_optimizer("AdamW", lr=1e-4)
    constant.set_lr_scheduler("ConstantWarmupScheduler", num_warmup_steps=1)
    everything = make_model(folder, {})
    everything.set_optimizer("AdamW", lr=1e-4)
    cases = {
        "base": make_model(other, {}),
        "lora": make_model(folder, lora | {"r": 2}),
        "sgd": sgd,
        "constant": constant,
        "everything": everything,
    }
    result: dict[str, Any] = {}
    for case, each in cases.items():
        before = each.get_state_dict() if each._trainer.trained else None
        result[case] = error_of(lambda each=each: each.resume_from_checkpoint(path))
        after = each.get_state_dict() if each._trainer.trained else None
        result[f"{case} unchanged"] = before is None or all(
            torch.equal(before[name], after[name]) for name in before
        )
    bare = model.save("bare", output_dir)
    result["bare"] = error_of(lambda: make_model(folder, {}).resume_from_checkpoint(bare))
    return result


def damaged(folder: Any, batches: Sequence[Batch], output_dir: Any) -> dict[str, Any]:
    """Save twice, damage a file of the second; return the error, and where resuming goes on."""
    model = ready(folder, {"r": 4, "target_modules": ["q_proj"]})
    for number, batch in enumerate(batches, start=1):
        steps(model, [batch])
        model.save(f"step-{number}", output_dir, save_optimizer=True)
    last = Path(output_dir) / f"step-{len(batches)}"
    if model._network.groups.rank == 0:
        shard = next((last / "state" / "exp_avg").glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    torch.distributed.barrier()
    fresh = make_model(folder, {})
    error = error_of(lambda: fresh.resume_from_checkpoint(last))
    trained = dict(fresh._trainer.trained)
    place = fresh.resume_from_checkpoint(last, use_previous=True)
    return {"error": error, "trained": list(trained), "place": place}


def background(folder: Any, batch: Batch, output_dir: Any) -> dict[str, Any]:
    """Save while training goes on; the file has what was there at the call.  Then fail once."""
    model = ready(folder, {"r": 4, "target_modules": ["q_proj"]})
    steps(model, [batch])
    before = model.get_state_dict()
    path = model.save("behind", output_dir, save_optimizer=True, background=True)
    steps(model, [batch])
    model.wait_for_save()
    fresh = make_model(folder, {})
    fresh.resume_from_checkpoint(path)
    after = fresh.get_state_dict()
    blocked = Path(output_dir) / "blocked"
    if model._network.groups.rank == 0:
        blocked.mkdir()
        (blocked / "precious.txt").write_text("not ours")
    torch.distributed.barrier()
    started = error_of(
        lambda: model.save("blocked", output_dir, save_optimizer=True, background=True)
    )
    surfaced = error_of(model.wait_for_save)
    once = error_of(model.wait_for_save)
    if model._network.groups.rank == 0:
        shutil.rmtree(blocked)
    same = before is None or all(torch.equal(before[name], after[name]) for name in before)
    return {"same": same, "started": started, "surfaced": surfaced, "once": once}


def gathered_in_small_batches(folder: Any) -> dict[str, Any]:
    """Return the base gathered at once, and one tensor at a time."""
    from megatrain.export.gather import gather, stream
    from megatrain.model.base import base_slices

    network = make_model(folder, {})._network
    small: dict[str, Any] = {}
    for batch in stream(base_slices(network.table), network.groups, batch_bytes=1):
        small |= batch
    return {"whole": gather(base_slices(network.table), network.groups), "small": small}


def reward_model(
    folder: Any, path: Any, output_dir: Any, lora: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train a reward model a step, or go on from `path`; save, train two steps."""
    model = make_model(folder, lora if path is None else {}, task="reward")
    if path is None:
        model.set_optimizer("AdamW", lr=1e-4)
        model.forward_backward(inputs=pairs(0))
        model.clip_grad_and_step()
    else:
        model.resume_from_checkpoint(path)
    name = "half" if path is None else "again"
    saved, losses = model.save(name, output_dir, save_optimizer=True), []
    for seed in (1, 2):
        losses.append(model.forward_backward(inputs=pairs(seed)).loss)
        model.clip_grad_and_step()
    return {"path": saved, "losses": losses, "tensors": model.get_state_dict()}
