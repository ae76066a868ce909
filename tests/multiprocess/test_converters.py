"""Converters beside Megatron-Bridge: used where they are there, refused by name where not."""

import pytest

from megatrain.parallel.layout import DeviceMesh
from tests.multiprocess import converter_tasks
from tests.multiprocess.data import random_batch
from tests.multiprocess.truth import all_logps, hf_model, largest_difference

pytestmark = pytest.mark.multiprocess

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("bridge", ["megatron-bridge", *converter_tasks.FAKES])
def test_a_model_of_any_converter_is_trained_alike(bridge, ranks, checkpoints):
    folder, batch, mesh = checkpoints("qwen3"), random_batch(4), DeviceMesh(tp=2)
    expected = all_logps(hf_model(folder), batch)
    norms = ranks.run(converter_tasks.train_with, mesh, "megatron-bridge", folder, batch, LORA)
    for logps, norm, sizes in ranks.run(
        converter_tasks.train_with, mesh, bridge, folder, batch, LORA
    ):
        assert largest_difference(logps, expected) <= 1e-5
        assert norm == norms[0][1] > 0
        if bridge != "megatron-bridge":
            assert sizes["tensor_model_parallel_size"] == 2
            assert sizes["expert_model_parallel_size"] == 1


@pytest.mark.parametrize("bridge", converter_tasks.FAKES)
def test_a_converter_that_is_not_installed_is_named(bridge, ranks, checkpoints):
    kinds, text = ranks.run(converter_tasks.missing, None, bridge, checkpoints("qwen3"))[0]
    assert "ConfigError" in kinds
    assert bridge in text
    assert "not installed" in text


def test_another_package_of_the_same_name_is_refused(ranks, checkpoints):
    kinds, text = ranks.run(converter_tasks.impostor, None, checkpoints("qwen3"))[0]
    assert "ConfigError" in kinds
    assert "is not the converter" in text
