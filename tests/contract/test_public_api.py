"""What users' scripts rely on: names, parameters and defaults that must not change unnoticed."""

import inspect

import pytest

import megatrain
from megatrain.api.megatron_model import MegatronModel

METHODS = {
    "__init__": (
        "(self, model_id, *, device_mesh=None, remote_group=None, mixed_precision='bf16', "
        "**options)"
    ),
    "add_adapter_to_model": "(self, adapter_name, config, *, gradient_accumulation_steps=1)",
    "delete_adapter": "(self, adapter_name)",
    "set_optimizer": "(self, optimizer_cls='AdamW', *, adapter_name=None, **options)",
    "set_lr_scheduler": "(self, scheduler_cls, *, adapter_name=None, **options)",
    "set_loss": "(self, loss_cls, *, adapter_name=None, trust_remote_code=False, **options)",
    "set_processor": (
        "(self, processor_cls, *, adapter_name=None, trust_remote_code=False, **options)"
    ),
    "set_template": (
        "(self, template_cls, model_id=None, *, adapter_name=None, trust_remote_code=False, "
        "**options)"
    ),
    "apply_patch": "(self, patch_cls, *, trust_remote_code=False, **options)",
    "forward_backward": (
        "(self, *, inputs, adapter_name=None, micro_batch_size=None, **loss_inputs)"
    ),
    "forward_only": "(self, *, inputs, adapter_name=None, micro_batch_size=None, **loss_inputs)",
    "forward_backward_async": (
        "(self, *, inputs, adapter_name=None, micro_batch_size=None, timeout_s=None, **loss_inputs)"
    ),
    "forward_only_async": (
        "(self, *, inputs, adapter_name=None, micro_batch_size=None, timeout_s=None, **loss_inputs)"
    ),
    "clip_grad_and_step_async": ("(self, max_grad_norm=1.0, *, adapter_name=None, timeout_s=None)"),
    "clip_grad_and_step": "(self, max_grad_norm=1.0, *, adapter_name=None)",
    "clip_grad_norm": "(self, max_grad_norm=1.0, *, adapter_name=None)",
    "step": "(self, *, adapter_name=None)",
    "zero_grad": "(self, *, adapter_name=None)",
    "lr_step": "(self, *, adapter_name=None)",
    "calculate_metric": "(self, is_training=True, *, adapter_name=None)",
    "get_train_configs": "(self, *, adapter_name=None)",
    "get_gradients": "(self, *, adapter_name=None)",
    "get_state_dict": "(self, *, adapter_name=None)",
    "save": (
        "(self, name, output_dir='output', save_optimizer=False, consumed_train_samples=None, *, "
        "adapter_name=None, background=False)"
    ),
    "wait_for_save": "(self)",
    "close": "(self)",
    "load": "(self, adapter, *, adapter_name=None)",
    "resume_from_checkpoint": (
        "(self, resume_from_checkpoint, *, adapter_name=None, use_previous=False)"
    ),
}


def _signature(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_the_model_keeps_its_parameters(name):
    assert _signature(getattr(MegatronModel, name)) == METHODS[name]


def test_there_is_no_public_method_beside_these():
    public = {name for name in dir(MegatronModel) if not name.startswith("_")}
    assert public == METHODS.keys() - {"__init__"} | {"adapter_names"}


def test_every_public_name_can_be_had():
    assert all(getattr(megatrain, name) is not None for name in megatrain.__all__)
    assert set(dir(megatrain)) == set(megatrain.__all__)


def test_initialize_keeps_its_parameters():
    names = list(inspect.signature(megatrain.initialize).parameters)
    assert names == [
        "mode",
        "global_device_mesh",
        "seed",
        "platform",
        "timeout_s",
        "nproc_per_node",
        "address",
        "groups",
        "options",
    ]
    assert inspect.signature(megatrain.initialize).parameters["seed"].default == 42


def test_a_mesh_is_made_from_sizes():
    parameters = inspect.signature(megatrain.DeviceMesh.from_sizes).parameters
    assert {f"{axis}_size" for axis in ("dp", "tp", "pp", "cp", "ep", "etp", "vpp")} <= set(
        parameters
    )
