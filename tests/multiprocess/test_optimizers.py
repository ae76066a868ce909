"""Optimizers on split master weights are torch's on whole ones, on every layout.

Gradients are random numbers by name, so that nothing but the optimizer can differ.
"""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import optimizer_tasks
from tests.multiprocess.optimizer_tasks import random_gradient
from tests.multiprocess.truth import hf_model, largest_adapter_difference, relative_difference

pytestmark = pytest.mark.multiprocess

STEPS = 3
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
WITH_ENDS = {
    "r": 4,
    "init_lora_weights": False,
    "target_modules": ["embed_tokens", "lm_head", "q_proj", "v_proj", "down_proj"],
}
MESHES = {
    "1": DeviceMesh(),
    "tp2": DeviceMesh(tp=2),
    "dp2": DeviceMesh(dp=2),
    "tp2-dp2": DeviceMesh(tp=2, dp=2),
    "pp2": DeviceMesh(pp=2),
}
MOE_MESHES = {"ep2": DeviceMesh(dp=2, ep=2), "tp2-ep2": DeviceMesh(tp=2, dp=2, ep=2, etp=2)}


def moved(report: dict[str, Any]) -> dict[str, Tensor]:
    """Return how far each tensor went."""
    return {name: report["after"][name] - value for name, value in report["initial"].items()}


def follow(initial: dict[str, Tensor], make: Any, num_steps: int = STEPS) -> dict[str, Tensor]:
    """Return the tensors after steps of the optimizers that `make` returns for named parameters."""
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in initial.items()}
    optimizers = make(parameters)
    for step in range(num_steps):
        for name, parameter in parameters.items():
            parameter.grad = random_gradient(name, parameter.shape, step)
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("kind", "options", "torch_kind"),
    [
        ("AdamW", {"lr": 1e-2, "weight_decay": 0.1}, torch.optim.AdamW),
        ("default", {"lr": 1e-2, "foreach": True}, torch.optim.AdamW),
        ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}, torch.optim.Adam),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, torch.optim.SGD),
    ],
    ids=["adamw", "default", "adam", "sgd"],
)
@pytest.mark.parametrize("mesh", [MESHES["tp2-dp2"], MESHES["pp2"]], ids=["tp2-dp2", "pp2"])
def test_torchs_optimizers_step_as_on_whole_weights(
    mesh, kind, options, torch_kind, ranks, checkpoints
):
    ours = ranks.run(
        optimizer_tasks.optimize, mesh, checkpoints("qwen3"), LORA, kind, options, STEPS
    )[0]
    theirs = follow(ours["initial"], lambda p: [torch_kind(p.values(), **options)])
    # One step moves a weight by about 1e-2; fused and single-tensor kernels round differently.
    assert largest_adapter_difference(ours["after"], theirs) <= 1e-6


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Muon"])
def test_offloading_changes_no_number(kind, ranks, checkpoints):
    def run(**options: Any) -> dict[str, Any]:
        options = {"lr": 1e-2} | options
        task, mesh = optimizer_tasks.optimize, MESHES["dp2"]
        return ranks.run(task, mesh, checkpoints("qwen3"), LORA, kind, options, STEPS)[0]

    there, here = run(offload_optimizer=True), run()
    assert there["devices"] == ["cpu"]
    assert largest_adapter_difference(there["after"], here["after"]) == 0.0


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_no_decay_leaves_what_matches_alone(mesh, ranks, checkpoints):
    decayed = {"lr": 1e-2, "weight_decay": 0.5}
    options = decayed | {"no_decay": [r"norm\.weight$", r"\.bias$"]}
    report = ranks.run(
        optimizer_tasks.optimize, mesh, checkpoints("qwen2"), {}, "AdamW", options, STEPS
    )
    alone = [n for n in report[0]["initial"] if n.endswith(("norm.weight", ".bias"))]
    assert len(alone) > 8

    def make(parameters: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": [p for n, p in parameters.items() if n not in alone]},
            {"params": [parameters[n] for n in alone], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, **decayed)]

    theirs = follow(report[0]["initial"], make)
    assert largest_adapter_difference(report[0]["after"], theirs) <= 1e-6
    assert [[g["weight_decay"] for g in each["groups"]] for each in report] == [[0.5, 0.0]] * len(
        report
    )


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_lora_plus_trains_as_pefts_optimizer(mesh, ranks, checkpoints):
    folder = checkpoints("qwen3")
    options = {
        "lr": 1e-3,
        "weight_decay": 0.1,
        "loraplus_lr_ratio": 16.0,
        "loraplus_lr_embedding": 1e-5,
    }
    report = ranks.run(optimizer_tasks.optimize, mesh, folder, WITH_ENDS, "AdamW", options, STEPS)
    model = get_peft_model(hf_model(folder), LoraConfig(**WITH_ENDS))
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=16.0,
        loraplus_lr_embedding=1e-5,
        loraplus_weight_decay=0.1,
    )
    factors = {
        name.removeprefix("base_model.model.")
        .replace(".default.weight", "")
        .replace("lora_embedding_", "lora_")
        .removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert factors.keys() == report[0]["initial"].keys()
    for name, parameter in factors.items():
        parameter.data.copy_(report[0]["initial"][name])
    for step in range(STEPS):
        for name, parameter in factors.items():
            parameter.grad = random_gradient(name, parameter.shape, step)
        theirs.step()
    found = {name: parameter.detach() for name, parameter in factors.items()}
    assert largest_adapter_difference(report[0]["after"], found) <= 1e-6
    rates = [1e-3, pytest.approx(1.6e-2), 1e-5]
    assert all([g["lr"] for g in each["groups"]] == rates for each in report)


def newton_schulz_64(update: Tensor) -> Tensor:
    """Return Keller Jordan's iteration in float64, from the blog post."""
    x = update.double() / update.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_64(
    initial: dict[str, Tensor], is_matrix: Any, lr: float, decay: float
) -> dict[str, Tensor]:
    """Return matrices after Muon's steps in float64: momentum 0.95, Nesterov."""
    result = {}
    for name, value in initial.items():
        if not is_matrix(name, value):
            continue
        weight, buffer = value.double(), torch.zeros(value.shape, dtype=torch.float64)
        for step in range(STEPS):
            gradient = random_gradient(name, value.shape, step).double()
            buffer = 0.95 * buffer + 0.05 * gradient
            update = newton_schulz_64(0.05 * gradient + 0.95 * buffer)
            rows, columns = value.shape
            weight = weight * (1 - lr * decay) - lr * math.sqrt(max(1, rows / columns)) * update
        result[name] = weight
    return result


def in_a_layer(name: str, value: Tensor) -> bool:
    return value.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name


MUON = {"lr": 1e-2, "weight_decay": 0.1, "adamw_lr": 1e-3}
CASES = [
    *(("qwen3", WITH_ENDS, name) for name in MESHES),
    *(("qwen3", {}, name) for name in MESHES),
    ("qwen3_tied", {}, "pp2"),
    *(("qwen3_moe", lora, name) for lora in (LORA, {}) for name in MOE_MESHES),
]
FAST = [("qwen3", WITH_ENDS, "tp2-dp2"), ("qwen3_moe", {}, "tp2-ep2")]


@pytest.mark.parametrize(
    ("family", "lora", "mesh"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
    ids=[f"{f}-{'lora' if lora else 'full'}-{m}" for f, lora, m in CASES],
)
def test_muon_orthogonalises_whole_matrices_on_every_layout(family, lora, mesh, ranks, checkpoints):
    ours = ranks.run(
        optimizer_tasks.optimize,
        (MESHES | MOE_MESHES)[mesh],
        checkpoints(family),
        lora,
        "Muon",
        MUON | {"ns_dtype": "float32"},
        STEPS,
    )[0]
    matrices = muon_64(ours["initial"], in_a_layer, 1e-2, 0.1)
    assert matrices
    far = {name: value - ours["initial"][name].double() for name, value in matrices.items()}
    near = {name: moved(ours)[name].double() for name in matrices}
    # Five iterations in float32 magnify rounding of 1e-7 by the polynomial's slope, 3.4 ** 5.
    assert relative_difference(near, far) <= 1e-4
    others = {name: value for name, value in ours["initial"].items() if name not in matrices}
    expected = follow(
        others, lambda p: [torch.optim.AdamW(p.values(), lr=1e-3, weight_decay=0.1)] if p else []
    )
    assert all(
        largest_adapter_difference({n: ours["after"][n]}, {n: expected[n]}) <= 1e-6 for n in others
    )


@pytest.mark.parametrize("mesh", ["1", "tp2-dp2"])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon_is_torchs_within_bfloat16(mesh, adjust, ranks, checkpoints):
    options = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    ours = ranks.run(
        optimizer_tasks.optimize, MESHES[mesh], checkpoints("qwen3"), LORA, "Muon", options, STEPS
    )[0]
    theirs = follow(ours["initial"], lambda p: [torch.optim.Muon(p.values(), **options)])
    far = {name: value - ours["initial"][name] for name, value in theirs.items()}
    # Rounding to bfloat16, 2 ** -9, in another order of sums, magnified by the iteration.
    assert relative_difference(moved(ours), far) <= 0.1


@pytest.mark.parametrize(
    ("kind", "options", "keys"),
    [
        ("AdamW", {"lr": 1e-2}, ["exp_avg", "exp_avg_sq"]),
        ("AdamW", {"lr": 1e-2, "loraplus_lr_ratio": 4, "fused": False}, ["exp_avg", "exp_avg_sq"]),
        ("Adam", {"lr": 1e-2, "amsgrad": True}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        ("SGD", {"lr": 1e-2, "momentum": 0.9, "offload_optimizer": True}, ["momentum_buffer"]),
        (
            "Muon",
            {"lr": 1e-2, "loraplus_lr_ratio": 4, "no_decay": ["lora_A$"]},
            ["exp_avg", "exp_avg_sq", "momentum_buffer"],
        ),
    ],
    ids=["adamw", "lora-plus", "amsgrad", "sgd", "muon"],
)
@pytest.mark.parametrize("mesh", ["1", "tp2-dp2"])
def test_an_optimizers_state_goes_to_another_bit_for_bit(
    mesh, kind, options, keys, ranks, checkpoints
):
    report = ranks.run(
        optimizer_tasks.interrupted, MESHES[mesh], checkpoints("qwen3"), WITH_ENDS, kind, options
    )[0]
    assert report["keys"] == keys
    assert report["counters"] == ({} if kind == "SGD" else {"step": 2.0})
    assert report["same_state"]
    assert all(report["shapes"])
    assert largest_adapter_difference(report["straight"], report["resumed"]) == 0.0
    assert "CheckpointError" in report["short"][0]


@pytest.mark.parametrize(
    ("lora", "kind", "options", "words"),
    [
        (LORA, "Adamw", {}, "did you mean 'AdamW'"),
        (LORA, "AdamW", {"learning_rate": 1e-3}, "learning_rate"),
        (LORA, "AdamW", {"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        (LORA, "AdamW", {"lr": -1.0}, "lr"),
        (LORA, "AdamW", {"lr": "high"}, "high"),
        (LORA, "AdamW", {"adamw_parameters": ["q_proj"]}, "adamw_parameters"),
        (LORA, "AdamW", {"differentiable": True}, "differentiable"),
        (LORA, "AdamW", {"no_decay": ["bias"]}, "no trained parameter's name matches 'bias'"),
        (LORA, "AdamW", {"no_decay": ["("]}, "no regular expression"),
        (LORA, "AdamW", {"no_decay": "bias"}, "list of regular expressions"),
        (LORA, "AdamW", {"loraplus_lr_ratio": 0}, "positive"),
        (LORA, "AdamW", {"loraplus_lr_embedding": 1e-6}, "loraplus_lr_ratio"),
        (LORA, "AdamW", {"offload_optimizer": "yes"}, "offload_optimizer"),
        (LORA, "Muon", {"ns_steps": 0}, "ns_steps"),
        (LORA, "Muon", {"adjust_lr_fn": "orginal"}, "did you mean 'original'"),
        (LORA, "Muon", {"ns_dtype": "float64"}, "ns_dtype"),
        ({}, "AdamW", {"no_decay": ["layers.0.self_attn.q_proj.weight"]}, "fused"),
        ({}, "AdamW", {"loraplus_lr_ratio": 16}, "the base itself"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_option_that_cannot_work_is_refused_on_every_rank(
    lora, kind, options, words, ranks, checkpoints
):
    for kinds, text in ranks.run(
        optimizer_tasks.refusal, MESHES["pp2"], checkpoints("qwen3"), lora, kind, options
    ):
        assert "ConfigError" in kinds
        assert words in text


@pytest.mark.parametrize(
    "options",
    [
        {"lr_decay_steps": 20},
        {"lr_decay_steps": 20, "lr_warmup_steps": 4, "lr_warmup_init": 1e-5, "min_lr": 2e-5},
        {"lr_decay_steps": 12, "lr_decay_style": "linear", "max_lr": 1e-3},
        {"lr_decay_steps": 25, "lr_decay_style": "inverse-square-root", "lr_warmup_steps": 3},
        {"lr_decay_steps": 8, "lr_decay_style": "constant", "lr_warmup_steps": 3},
    ],
    ids=["cosine", "warm", "linear", "root", "constant"],
)
def test_the_default_schedule_is_megatrons(options, ranks):
    ((ours, theirs),) = ranks.run(
        optimizer_tasks.rates_here_and_in_megatron, None, 3e-4, options, 30
    )
    # The factor is on the optimizer's lr: one division and one product.
    assert ours == pytest.approx(theirs, rel=1e-14, abs=0)
