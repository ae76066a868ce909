"""Training that starts from an adapter in PEFT's format: `model.load` and `train.adapter`."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model

from megatrain.export.peft_adapter import CONFIG
from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import start_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.train_settings import FILES, lines_of, settings
from tests.multiprocess.train_tasks import train, train_error
from tests.multiprocess.truth import all_logps, hf_model, largest_difference

pytestmark = [pytest.mark.multiprocess, pytest.mark.api]

BATCH = random_batch(4, seed=5)
TOLERANCE = 1e-5


def made_by_peft(folder, path):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2},
    )
    model = get_peft_model(hf_model(folder), config)
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.parametrize("mesh", [DeviceMesh(), DeviceMesh(tp=2, pp=2)], ids=DeviceMesh.describe)
def test_a_loaded_adapter_computes_what_peft_computes(mesh, ranks, checkpoints, tmp_path):
    folder = checkpoints("qwen3")
    expected = all_logps(made_by_peft(folder, tmp_path / "peft"), BATCH)
    for found in ranks.run(start_tasks.load, mesh, folder, tmp_path / "peft", BATCH):
        assert largest_difference(found["new"], expected) <= TOLERANCE
        assert largest_difference(found["again"], expected) <= TOLERANCE
        assert found["norm"] > 0


def test_an_adapter_that_cannot_be_loaded_is_refused_on_every_rank(ranks, checkpoints, tmp_path):
    folder, good = checkpoints("qwen3"), tmp_path / "peft"
    made_by_peft(folder, good)
    dora = tmp_path / "dora"
    shutil.copytree(good, dora)
    config = json.loads((dora / CONFIG).read_text())
    (dora / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    places = {"use_dora": dora, "nothing-here": tmp_path / "nothing-here"}
    for word, place in places.items():
        for kinds, text in ranks.run(start_tasks.load_error, DeviceMesh(tp=2), folder, place):
            assert "CheckpointError" in kinds
            assert word in text


@pytest.mark.local_only
def test_a_run_goes_on_from_another_runs_adapter(ranks, base, data, tmp_path):
    lines = (data / FILES["sft"]).read_text().splitlines()[:8]
    (tmp_path / "eight.jsonl").write_text("\n".join(lines) + "\n")
    values = settings(base, tmp_path / "eight.jsonl", tmp_path / "four")
    steps = ["train.shuffle=false", "optimizer.name=SGD", "optimizer.lr=0.1"]
    ranks.run(train, None, values, [*steps, "train.max_steps=4"])
    values["output_dir"] = str(tmp_path / "three")
    ranks.run(train, None, values, [*steps, "train.max_steps=3"])
    values["output_dir"] = str(tmp_path / "one")
    adapter = f"train.adapter={tmp_path / 'three' / 'last'}"
    refused = ranks.run(train_error, None, values, [*steps, adapter])[0]
    assert "leave [lora]" in refused[1]
    del values["lora"]
    ranks.run(train, DeviceMesh(tp=2), values, [*steps, "train.max_steps=1", adapter])
    losses = lines_of(tmp_path / "four")
    assert losses[3] < losses[0] - 0.01
    assert abs(lines_of(tmp_path / "one")[0] - losses[3]) <= TOLERANCE


@pytest.mark.local_only
@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_preferences_are_compared_with_the_adapter_that_training_starts_from(
    recipe, ranks, base, data, tmp_path
):
    """At first policy and reference are the same; a run that resumes has the same reference."""
    sft = settings(base, data / FILES["sft"], tmp_path / "sft")
    ranks.run(train, None, sft, ["train.max_steps=3"])
    values = settings(base, data / FILES[recipe], tmp_path / "straight", recipe)
    del values["lora"]
    options = [f"train.adapter={tmp_path / 'sft' / 'last'}", "optimizer.lr=1e-3"]
    mesh = DeviceMesh(tp=2)
    ranks.run(train, mesh, values, [*options, "train.max_steps=4"])
    values["output_dir"] = str(tmp_path / "stopped")
    ranks.run(train, mesh, values, [*options, "train.max_steps=2"])
    ranks.run(train, mesh, values, [*options, "train.max_steps=4", "train.resume=auto"])
    moved = {"dpo": "rewards/margins", "kto": "rewards/chosen"}[recipe]
    straight = lines_of(tmp_path / "straight", moved)
    assert abs(straight[0]) <= 1e-6
    assert abs(straight[-1]) > 1e-3
    assert lines_of(tmp_path / "stopped", moved) == pytest.approx(straight, abs=TOLERANCE)
    if recipe == "kto":
        kls = lines_of(tmp_path / "straight", "kl")
        assert kls[0] <= 1e-6
    saved = sorted(path.name for path in (tmp_path / "stopped" / "last").rglob("*"))
    assert not [name for name in saved if "reference" in name]
