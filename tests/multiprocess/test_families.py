"""Every architecture on every kind of layout against Transformers, and the record of what holds.

The record, megatrain/config/support.json, is what these tests found:

    MEGATRAIN_RECORD=1 uv run pytest -m "slow or not slow" tests/multiprocess/test_families.py
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from megatrain.parallel.layout import DeviceMesh
from megatrain.testing.families import ARCHITECTURES, TOWERS
from tests.fixtures import support_record
from tests.fixtures.support_record import LAYOUTS, PLAN, VARIANTS, Plan
from tests.multiprocess import conversion_tasks, family_tasks, tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import all_logps, hf_model, largest_difference

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-5
"""Float32 sums in another order differ by about 1e-6."""
SHARP = {"initializer_range": 0.05}
"""Weights larger than Transformers' 0.02, so that no part of a layer is too small to be seen."""
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
FAST = ("qwen3_next", "mixtral", "gemma3", "phi3")
"""Families beyond those of the other tests that run by default: one of each kind of layer."""


@pytest.fixture(scope="module")
def support() -> Iterator[Callable[..., None]]:
    """Note `support(name, column, reason)`: reason None if it holds.  Kept if so wished."""
    found: dict[str, dict[str, str | None]] = {}

    def note(name: str, column: str, reason: str | None) -> None:
        found.setdefault(name, {})[column] = reason

    yield note
    if os.environ.get("MEGATRAIN_RECORD"):
        support_record.write(found)


def transformers_model(name: str, folder: Path) -> Any:
    """Return the model as Transformers loads it."""
    if name in TOWERS:
        kind = transformers.AutoModelForImageTextToText
        return kind.from_pretrained(folder, dtype=torch.float32).eval()
    model: Any = hf_model(folder)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # SDPA leaves the cap out
    return model


def with_adapter(model: Any, adapter: str) -> Any:
    """Return the model with a saved adapter in PEFT; a key that it does not take is an error."""
    with warnings.catch_warnings():
        # PEFT looks for the keys of rank_pattern among modules only, and then uses them for
        # target_parameters all the same.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        model = PeftModel.from_pretrained(model, adapter)
        loaded = model.load_adapter(adapter, "default")
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    return model.eval()


def with_experts_in_one_tensor(folder: Path, out: Path) -> Path:
    """Write a checkpoint as Qwen3.5-MoE is published: two tensors of all experts in a layer."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    for block in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{block}.experts.{i}.{part}_proj.weight"] for i in range(4)])
            for part in ("gate", "up", "down")
        )
        kept[f"{block}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        kept[f"{block}.experts.down_proj"] = down
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture
def published(checkpoints, tmp_path) -> Callable[[str], Path]:
    """Return a family's tiny checkpoint in the form that its models are published in."""

    def make(name: str) -> Path:
        folder: Path = checkpoints(name, **SHARP)
        if name != "qwen3_5_moe_vl":
            return folder
        return with_experts_in_one_tensor(folder, tmp_path / "packed")

    return make


def marked(name: str) -> object:
    """Leave the rest to a run that has time."""
    if name in FAST:
        return name
    return pytest.param(name, marks=[pytest.mark.slow, pytest.mark.matrix])


HOLDING = [marked(name) for name, plan in PLAN.items() if plan.refused is None]
REFUSED = [name for name, plan in PLAN.items() if plan.refused is not None]


def test_there_is_a_plan_for_every_architecture():
    assert set(PLAN) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.slow
def test_log_probabilities_on_every_layout_are_those_of_transformers(
    name, ranks, published, support
):
    plan, batch, folder = PLAN[name], random_batch(6), published(name)
    expected = all_logps(transformers_model(name, folder), batch)
    for column, mesh in LAYOUTS.items():
        if column == "ep" and not plan.has_experts:
            continue
        for actual in ranks.run(family_tasks.logps_or_error, mesh, folder, batch):
            if column in plan.refused_layouts:
                assert isinstance(actual, tuple), f"{column} holds"
                assert plan.refused_layouts[column] in actual[1]
            else:
                assert not isinstance(actual, tuple), actual
                assert largest_difference(actual, expected) <= TOLERANCE
        support(name, column, plan.refused_layouts.get(column))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_hold_is_refused_by_name(name, ranks, tmp_path, support):
    plan: Plan = PLAN[name]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [plan.architecture]}))
    error = ranks.run(family_tasks.loading_error, DeviceMesh(), tmp_path)[0]
    assert error is not None
    assert "UnknownFamilyError" in error[0]
    assert plan.refused in error[1]
    for column in support_record.COLUMNS:
        support(name, column, plan.refused)


@pytest.mark.parametrize("name", HOLDING)
def test_an_adapter_on_all_linears_trains_and_is_the_same_in_peft(
    name, ranks, published, tmp_path, support
):
    plan, batch, folder = PLAN[name], random_batch(4), published(name)
    mesh = DeviceMesh(tp=2)
    result = ranks.run(family_tasks.trained_adapter, mesh, folder, LORA, batch, str(tmp_path))[0]
    if plan.refused_lora is not None:
        assert isinstance(result, tuple), "lora holds"
        assert plan.refused_lora in result[1]
    else:
        assert not isinstance(result, tuple), result
        model = with_adapter(transformers_model(name, folder), result["saved"])
        expected = all_logps(model, batch)
        assert largest_difference(result["logps"], expected) <= TOLERANCE
    for column in ("lora", "export"):
        support(name, column, plan.refused_lora)


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.slow
def test_what_goes_through_megatrons_format_comes_back_byte_for_byte(
    name, ranks, published, tmp_path, support
):
    plan = PLAN[name]
    columns = [
        column
        for column in ("load", "tp", "pp", "ep")
        if column not in plan.refused_layouts and (column != "ep" or plan.has_experts)
    ]
    meshes = [LAYOUTS[column] for column in columns]
    place = tmp_path / "converted"
    assert ranks.run(conversion_tasks.round_trip, None, published(name), place, meshes) == [[]]
    support(name, "import", None)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_settings_of_published_models_are_those_of_transformers(name, ranks, checkpoints):
    family, changes = VARIANTS[name]
    folder, batch = checkpoints(family, **SHARP, **changes), random_batch(6)
    expected = all_logps(hf_model(folder), batch)
    for mesh in (DeviceMesh(), DeviceMesh(tp=2)):
        actual = ranks.run(tasks.base_logps, mesh, folder, batch)[0]
        assert largest_difference(actual, expected) <= TOLERANCE


REFUSED_SETTINGS = {
    "dynamic scaling": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
        "does not carry rope_parameters",
    ),
    "attention biases": ("qwen3", {"attention_bias": True}, "reads no tensor like"),
    "biases everywhere": ("ernie4_5", {"use_bias": True}, "reads no tensor like"),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_a_bridge_leaves_out_are_refused(name, ranks, checkpoints):
    family, changes, message = REFUSED_SETTINGS[name]
    folder = checkpoints(family, **changes)
    error = ranks.run(family_tasks.loading_error, DeviceMesh(), folder)[0]
    assert error is not None
    assert message in error[1]


def test_kimi_k2_is_deepseek_v3_under_another_name(ranks, checkpoints, tmp_path):
    folder, batch = checkpoints("deepseek_v3", **SHARP), random_batch(4)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "kimi_k2"
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    shutil.copytree(folder, tmp_path / "kimi")
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config))
    expected = all_logps(hf_model(folder), batch)
    actual = ranks.run(tasks.base_logps, DeviceMesh(tp=2), tmp_path / "kimi", batch)[0]
    assert largest_difference(actual, expected) <= TOLERANCE


def test_adapters_on_experts_that_transformers_has_no_names_for_are_refused(
    ranks, checkpoints, tmp_path
):
    folder = checkpoints("qwen3_5_moe_vl", **SHARP)  # each expert's matrices apart
    lora = (DeviceMesh(), folder, LORA, random_batch(4), str(tmp_path))
    result = ranks.run(family_tasks.trained_adapter, *lora)[0]
    assert isinstance(result, tuple)
    assert "ExportError" in result[0]
    assert "do not fit the model" in result[1]


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2)], ids=DeviceMesh.describe)
def test_concatenated_projections_are_written_back_byte_by_byte(mesh, ranks, checkpoints):
    folder = checkpoints("phi3", **SHARP)
    wanted = load_file(folder / "model.safetensors")
    for written in ranks.run(family_tasks.written_by_bridge, mesh, folder):
        assert len(written) == 4
        for name, value in written.items():
            assert value.equal(wanted[name])


def test_packed_sequences_of_delta_nets_do_not_leak(ranks, checkpoints):
    folder = checkpoints("qwen3_next", **SHARP)
    result = ranks.run(
        tasks.logps_alone_and_packed, DeviceMesh(), folder, random_batch(5, longest=80)
    )
    alone = result[0]["alone"]
    assert largest_difference(result[0]["packed"], alone) <= TOLERANCE
    assert largest_difference(result[0]["reversed"], alone) <= TOLERANCE


@pytest.mark.skipif("MEGATRAIN_RECORD" in os.environ, reason="the record is being written")
def test_the_record_agrees_with_the_plan():
    assert support_record.read() == support_record.planned()


def test_a_run_of_some_tests_keeps_the_rest_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(support_record, "RECORD", tmp_path / "record.json")
    support_record.write({"qwen3": {"load": None, "tp": "no"}, "gemma": {"load": None}})
    support_record.write({"qwen3": {"import": None}, "phi3": {"tp": None}})
    rows = {each["family"]: each for each in support_record.read()}
    qwen3, gemma, phi3 = (rows[PLAN[name].family] for name in ("qwen3", "gemma", "phi3"))
    assert (qwen3["load"], qwen3["tp"], qwen3["import"]) == ("ok", "refused: no", "ok")
    assert (gemma["load"], gemma["tp"]) == ("ok", "not tested")
    assert (phi3["load"], phi3["tp"]) == ("not tested", "ok")
