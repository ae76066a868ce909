"""What ranks do for test_tenants: many adapters in one batch, and each of them alone."""

from typing import Any

import numpy as np

from tests.multiprocess.data import random_batch
from tests.multiprocess.loss_tasks import call_inputs, pairs
from tests.multiprocess.tasks import error_of, make_model

DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENANTS: dict[str, tuple[dict[str, Any], str, dict[str, Any], list[str]]] = {
    "a": ({"r": 1, "lora_alpha": 2, "target_modules": "all-linear"}, "CrossEntropyLoss", {}, []),
    "b": ({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}, "GRPOLoss", {}, ["old_logps", "advantages"]),  # noqa: E501
    "c": ({"r": 64, "lora_alpha": 32, "target_modules": DENSE}, "DPOLoss", {"reference_free": True}, []),  # noqa: E501
    "d": ({"r": 8, "lora_alpha": 16, "target_modules": ["down_proj", "gate_proj", "up_proj"]}, "CrossEntropyLoss", {}, []),  # noqa: E501
    "e": ({"r": 3, "lora_alpha": 3, "target_modules": ["o_proj"], "use_rslora": True}, "ImportanceSamplingLoss", {}, ["old_logps", "advantages"]),  # noqa: E501
    "f": ({"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}, "CrossEntropyLoss", {}, []),  # noqa: E501
    "g": ({"r": 32, "lora_alpha": 8, "target_modules": ["embed_tokens", "k_proj"]}, "CrossEntropyLoss", {}, []),  # noqa: E501
    "h": ({"r": 2, "lora_alpha": 8, "target_modules": "all-linear"}, "SimPOLoss", {}, []),
}  # fmt: skip
"""LoRA options, loss, its options, and what it takes, of eight tenants."""


def tenant_data(number: int, loss: str) -> list[dict[str, Any]]:
    """Return one tenant's data: pairs for losses of pairs, ragged ones otherwise."""
    if loss in ("DPOLoss", "SimPOLoss"):
        return pairs(seed=number, num_pairs=2)
    return random_batch(3, seed=number)[1:]


def tenants_of(model: Any, names: list[str]) -> tuple[list[str], list[Any], dict[str, list[Any]]]:
    """Make the adapters; return the adapter of each datum, the data, and the losses' inputs."""
    adapters: list[str] = []
    data: list[Any] = []
    columns: dict[str, list[Any]] = {"old_logps": [], "advantages": []}
    for number, name in enumerate(TENANTS):
        if name not in names:
            continue
        lora, loss, options, wanted = TENANTS[name]
        model.add_adapter_to_model(name, {"init_lora_weights": False, **lora})
        model.set_loss(loss, adapter_name=name, **options)
        batch = tenant_data(number, loss)
        given = call_inputs(batch)
        adapters += [name] * len(batch)
        data += batch
        for key, column in columns.items():
            column += given[key] if key in wanted else [None] * len(batch)
    return adapters, data, {k: v for k, v in columns.items() if any(x is not None for x in v)}


def shuffled(adapters: list[str], data: list[Any], columns: dict[str, list[Any]]) -> Any:
    """Return the same with tenants' units taken in turn, pairs kept together."""
    order = sorted(range(len(data)), key=lambda i: (adapters[:i].count(adapters[i]) // 2, i))
    return (
        [adapters[i] for i in order],
        [data[i] for i in order],
        {key: [column[i] for i in order] for key, column in columns.items()},
    )


def gradients_together(folder: Any, names: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return every tenant's output and gradient after one call for all of them."""
    model = make_model(folder, {}, **options)
    adapters, data, columns = shuffled(*tenants_of(model, names))
    output = model.forward_backward(inputs=data, adapter_name=adapters, **columns)
    assert not output.errors
    places = {name: [i for i, each in enumerate(adapters) if each == name] for name in names}
    for name in names:
        for place, logps in zip(places[name], output.adapters[name].logps, strict=True):
            assert np.array_equal(output.logps[place], logps)
    only = model.forward_only(inputs=data, adapter_name=adapters)
    return {
        name: (
            output.adapters[name].loss,
            output.adapters[name].logps,
            model.get_gradients(adapter_name=name),
            [only.logps[i] for i in places[name]],
            dict(output.adapters[name].statistics),
            output.adapters[name].squares,
        )
        for name in names
    }


def gradients_alone(folder: Any, names: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return every tenant's output and gradient, each from a call of its own."""
    model = make_model(folder, {}, **options)
    adapters, data, columns = shuffled(*tenants_of(model, names))
    result = {}
    for name in names:
        mine = [i for i, each in enumerate(adapters) if each == name]
        given = {key: [column[i] for i in mine] for key, column in columns.items()}
        given = {key: column for key, column in given.items() if column[0] is not None}
        output = model.forward_backward(inputs=[data[i] for i in mine], adapter_name=name, **given)
        gradients = model.get_gradients(adapter_name=name)
        model.zero_grad(adapter_name=name)
        only = model.forward_only(inputs=[data[i] for i in mine], adapter_name=name).logps
        statistics = dict(output.statistics)
        result[name] = (output.loss, output.logps, gradients, only, statistics, output.squares)
    return result


def deletion(folder: Any) -> Any:
    """Return what two adapters are before and after a third is deleted, which then is unknown."""
    model = make_model(folder, {})
    adapters, data, columns = tenants_of(model, ["a", "b", "c"])
    for name in ("a", "b", "c"):
        model.set_optimizer("AdamW", lr=1e-3, adapter_name=name)
    model.forward_backward(inputs=data, adapter_name=adapters, **columns)

    def all_of() -> dict[str, Any]:
        result = {}
        for name in ("a", "c"):
            state = model.get_state_dict(adapter_name=name) or {}
            gradients = model.get_gradients(adapter_name=name) or {}
            whole = state | {f"grad {key}": value for key, value in gradients.items()}
            result[name] = {key: value.numpy() for key, value in whole.items()}
        return result

    before = all_of()
    model.delete_adapter("b")
    after = all_of()
    error = error_of(lambda: model.forward_backward(inputs=data[:1], adapter_name="b"))
    for name in ("a", "c"):
        model.clip_grad_and_step(adapter_name=name)
    return before, after, sorted(model.adapter_names), error


def isolation(folder: Any) -> Any:
    """Return what two tenants have after a pass in which one of them has an infinite loss."""
    model = make_model(folder, {})
    for name in ("a", "b"):
        model.add_adapter_to_model(
            name, {"r": 4, "init_lora_weights": False, "target_modules": DENSE}
        )
    model.set_loss("GRPOLoss", adapter_name="b")
    batch = random_batch(4, seed=1)[1:]
    good = call_inputs(batch)
    model.forward_backward(
        inputs=batch, adapter_name="b", advantages=good["advantages"], old_logps=good["old_logps"]
    )
    norms = {name: _norm(model, name) for name in ("b",)}
    alone = model.forward_backward(inputs=batch, adapter_name="a").loss
    model.zero_grad(adapter_name="a")
    huge = [[-3e38] * len(row) for row in good["old_logps"]]
    output = model.forward_backward(
        inputs=batch * 2,
        adapter_name=["a"] * 3 + ["b"] * 3,
        advantages=[None] * 3 + [[1e38] * len(row) for row in good["old_logps"]],
        old_logps=[None] * 3 + huge,
    )
    assert all(np.isnan(each).all() for each in output.logps[3:])
    return (
        {"together": output.adapters["a"].loss, "alone": alone},
        {"before": norms["b"], "after": _norm(model, "b")},
        list(output.errors),
        next(iter(output.errors.values())),
    )


def _norm(model: Any, name: str) -> float:
    gradients = model.get_gradients(adapter_name=name) or {}
    return sum(float(value.double().square().sum()) for value in gradients.values())


def unlike(folder: Any) -> Any:
    """Return losses of adapters with dropout and a teacher: in one call, and each alone."""
    reports = []
    for together in (True, False):
        model = make_model(folder, {})
        lora = {"r": 4, "init_lora_weights": False, "target_modules": DENSE}
        model.add_adapter_to_model("plain", lora)
        model.add_adapter_to_model("drops", {**lora, "lora_dropout": 0.5})
        model.add_adapter_to_model("taught", lora)
        model.add_adapter_to_model("other", lora)
        model.set_loss("DistillationLoss", adapter_name="taught")
        batch = random_batch(3, seed=2)[1:]
        given = call_inputs(batch)
        teacher = {key: given[key] for key in ("teacher_tokens", "teacher_logps")}
        names = ["plain", "drops", "taught", "other"]
        if together:
            output = model.forward_backward(
                inputs=batch * 4,
                adapter_name=[name for name in names for _ in batch],
                **{k: [None] * 4 + v + [None] * 2 for k, v in teacher.items()},
            )
            reports.append([output.adapters[name].loss for name in names])
            continue
        reports.append(
            [
                model.forward_backward(
                    inputs=batch, adapter_name=name, **(teacher if name == "taught" else {})
                ).loss
                for name in names
            ]
        )
    return reports


BAD_CALLS = {
    "unknown": ("there is no adapter called 'z'", "StateError"),
    "too few": ("must have as many entries", "ConfigError"),
    "data": ("adapter 'b': row 0 is not encoded", "DataError"),
    "input": ("adapter 'a': CrossEntropyLoss does not take advantages", "DataError"),
    "size": ("micro_batch_size=2 has no effect", "ConfigError"),
}
"""By case: what the message says, and a class of the error."""


def bad_calls(folder: Any) -> Any:
    """Return the error of each bad call, and a gradient before and after all of them."""
    model = make_model(folder, {})
    for name in ("a", "b"):
        model.add_adapter_to_model(
            name, {"r": 4, "init_lora_weights": False, "target_modules": DENSE}
        )
    batch = random_batch(3, seed=2)[1:]
    model.forward_backward(inputs=batch, adapter_name=["a", "b"])
    before = [_norm(model, name) for name in ("a", "b")]

    def attempt(adapters: Any, inputs: Any = batch, **given: Any) -> Any:
        return error_of(
            lambda: model.forward_backward(inputs=inputs, adapter_name=adapters, **given)
        )

    errors = {
        "unknown": attempt(["a", "z"]),
        "too few": attempt(["a"]),
        "data": attempt(["a", "b"], [batch[0], {"labels": [1]}]),
        "input": attempt(["a", "b"], advantages=[[1.0], None]),
        "size": attempt(["a", "b"], micro_batch_size=2),
    }
    return errors, before, [_norm(model, name) for name in ("a", "b")]


def resident_run(folder: Any, options: dict[str, Any]) -> Any:
    """Return adapters, losses and metrics after steps of five tenants, some of them in turn."""
    model = make_model(folder, {}, **options)
    names = ["a", "b", "c", "d", "h"]
    adapters, data, columns = tenants_of(model, names)
    losses = []
    for name in names:
        model.set_optimizer("AdamW", lr=1e-3, adapter_name=name)
        model.set_lr_scheduler("LinearWarmupScheduler", adapter_name=name, **STEPS)
    for round_ in range(3):
        for name in names if round_ % 2 else names[::-1]:
            mine = [i for i, each in enumerate(adapters) if each == name]
            given = {key: [column[i] for i in mine] for key, column in columns.items()}
            given = {key: column for key, column in given.items() if column[0] is not None}
            batch = [data[i] for i in mine]
            for _ in range(2):  # gradients stay behind while others are used
                output = model.forward_backward(inputs=batch, adapter_name=name, **given)
                losses.append(output.loss)
        for name in names:
            model.clip_grad_and_step(adapter_name=name)
    output = model.forward_backward(inputs=data, adapter_name=adapters, **columns)
    together = [output.adapters[name].loss for name in names]
    metrics = {name: model.calculate_metric(adapter_name=name) for name in names}
    kept = {
        name: {key: each[key] for key in ("lr", "step", "grad_norm")}
        for name, each in metrics.items()
    }
    states = {name: model.get_state_dict(adapter_name=name) for name in names}
    gradients = {name: model.get_gradients(adapter_name=name) for name in names}
    return losses, kept, states, gradients, together, model.adapter_names


STEPS = {"num_warmup_steps": 2, "num_training_steps": 10}


def bad_memory(folder: Any) -> Any:
    """Return the error of a limit for memory without one for the device."""
    return error_of(lambda: make_model(folder, {}, max_cpu_loras=1))


def refused(folder: Any, options: dict[str, Any]) -> Any:
    """Return gradients before and after a pass in turns, of which the second has a bad label."""
    model = make_model(folder, {}, **options)
    for name in ("a", "b"):
        lora = {"r": 4, "init_lora_weights": False, "target_modules": DENSE, "lora_dropout": 0.1}
        model.add_adapter_to_model(name, lora)
    batch = random_batch(3, seed=2)[1:]
    model.forward_backward(inputs=batch, adapter_name=["a", "b"])
    before = [_norm(model, name) for name in ("a", "b")]
    bad = {**batch[1], "labels": [10_000_000] * len(batch[1]["labels"])}
    error = error_of(
        lambda: model.forward_backward(inputs=[batch[0], bad], adapter_name=["a", "b"])
    )
    return before, [_norm(model, name) for name in ("a", "b")], error


def refused_by_one(folder: Any, options: dict[str, Any]) -> Any:
    """Return the error of a pass whose second adapter has a bad label on the last rank alone."""
    from megatrain.api.session import current_session

    model = make_model(folder, {}, **options)
    lora = {"r": 4, "init_lora_weights": False, "target_modules": DENSE, "lora_dropout": 0.1}
    for name in ("a", "b"):
        model.add_adapter_to_model(name, lora)
    batch = random_batch(3, seed=2)[1:]
    if current_session().groups.rank == 1:
        batch[1] = {**batch[1], "labels": [10_000_000] * len(batch[1]["labels"])}
    return error_of(lambda: model.forward_backward(inputs=batch, adapter_name=["a", "b"]))
