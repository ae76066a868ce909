"""From a Hugging Face configuration to Megatron's description of the same model."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import torch

from megatrain.config.model import ModelConfig
from megatrain.errors import CheckpointError, ConfigError, LayoutError, UnknownFamilyError
from megatrain.model.carried import carry, check_carried
from megatrain.parallel.groups import Groups, check_model
from megatrain_bridges.refused import REFUSED

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}

UNFUSED = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "moe_permute_fusion",
    "moe_router_fusion",
    "apply_rope_fusion",
)
"""Fusions that need Transformer Engine, apex or a compiler; the torch back end has none of them."""


def choose_backend(wanted: str) -> str:
    """Return torch or te for auto, torch or te.  Raises ConfigError if te is not installed."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "te" and not (installed and torch.cuda.is_available()):
        raise ConfigError(
            "backend 'te' needs Transformer Engine and a CUDA device: "
            f"installed={installed}, cuda={torch.cuda.is_available()}",
            hint="pip install transformer-engine[pytorch], or use backend 'torch'",
        )
    if wanted == "auto":
        return "te" if installed and torch.cuda.is_available() else "torch"
    return wanted


def make_bridge(folder: Path) -> Any:
    """Return the AutoBridge of a checkpoint folder.  Raises UnknownFamilyError."""
    from megatron.bridge import AutoBridge  # noqa: PLC0415 - patched first

    from megatrain_bridges.register import towers  # noqa: PLC0415 - after AutoBridge

    _check_not_refused(folder)
    try:
        bridge = AutoBridge.from_hf_pretrained(str(folder))
        for architecture in towers.TOWERS.keys() & set(_architectures(folder)):
            whole = bridge.hf_pretrained.config
            bridge.hf_pretrained.config = towers.text_config(whole, architecture)
        return bridge
    except ValueError as error:
        found = _architectures(folder)
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UnknownFamilyError(
            f"AutoBridge has no bridge for {found}, the architecture in {folder}: {reason}",
            hint="see bridges/README.md for how to add a family",
        ) from error


def _architectures(folder: Path) -> list[str]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not JSON: {path}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object but {type(config).__name__}")
    return list(config.get("architectures") or [])


def _check_not_refused(folder: Path) -> None:
    for architecture in _architectures(folder):
        if architecture in REFUSED:
            raise UnknownFamilyError(
                f"{architecture} is not supported: {REFUSED[architecture]}",
                hint="see bridges/README.md for what is",
            )


def make_provider(bridge: Any, config: ModelConfig, groups: Groups) -> Any:
    """Return a finalized provider for this layout and precision.

    Raises LayoutError when the model does not fit the mesh, ConfigError when another converter
    would lose a setting.
    """
    try:
        provider = bridge.to_megatron_provider(load_weights=False)
    except (TypeError, AttributeError, KeyError) as error:
        raise UnknownFamilyError(
            f"AutoBridge cannot express this config.json: {type(error).__name__}: {error}",
            hint="a setting of this checkpoint (rope_parameters, say) is not supported",
        ) from error
    carry(bridge.hf_pretrained.config, provider)
    check_carried(bridge.hf_pretrained.config, provider)
    if provider.final_logit_softcapping and config.bridge != "megatron-bridge":
        raise ConfigError(
            "soft-capped logits need bridge='megatron-bridge': "
            f"final_logit_softcapping={provider.final_logit_softcapping}, bridge={config.bridge!r}"
        )
    check_model(groups.mesh, provider)
    if groups.mesh.etp > 1 and provider.num_moe_experts and provider.add_bias_linear:
        raise LayoutError(
            f"experts with biases cannot be split: etp={groups.mesh.etp}", hint="use etp=1"
        )
    _set_layout(provider, groups)
    _set_precision(provider, DTYPES[config.mixed_precision])
    _set_training(provider, config)
    backend = choose_backend(config.backend)
    if backend == "torch":
        _set_torch_backend(provider)
    provider.finalize()
    provider._pg_collection = groups.collection
    return provider


def _set_layout(provider: Any, groups: Groups) -> None:
    mesh = groups.mesh
    provider.tensor_model_parallel_size = mesh.tp
    provider.sequence_parallel = mesh.tp > 1
    provider.pipeline_model_parallel_size = mesh.pp
    provider.virtual_pipeline_model_parallel_size = mesh.vpp if mesh.vpp > 1 else None
    provider.context_parallel_size = mesh.cp
    provider.expert_model_parallel_size = mesh.ep
    provider.expert_tensor_parallel_size = mesh.etp
    provider.should_pad_vocab = provider.vocab_size % mesh.tp > 0
    provider.make_vocab_size_divisible_by = 1
    # Packed micro-batches have different lengths: stages tell each other the shape first.  The
    # interleaved schedule cannot (with two stages, previous and next are the same rank, and
    # shapes would be swapped), so there micro-batches are filled up to one length.
    provider.variable_seq_lengths = mesh.vpp == 1
    provider.overlap_p2p_comm = mesh.vpp > 1
    provider.batch_p2p_comm = mesh.vpp == 1


def _set_precision(provider: Any, dtype: torch.dtype) -> None:
    provider.params_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    provider.pipeline_dtype = provider.autocast_dtype = dtype
    provider.enable_autocast = False


def _set_training(provider: Any, config: ModelConfig) -> None:
    provider.perform_initialization = False
    provider.attention_dropout = provider.hidden_dropout = 0.0
    provider.calculate_per_token_loss = True
    provider.moe_token_dispatcher_type = "alltoall"
    # Bridge turns load-balancing losses on for several families; their value depends on how a batch
    # is packed, which nothing else does.
    provider.moe_aux_loss_coeff, provider.moe_router_load_balancing_type = 0.0, "none"
    provider.moe_z_loss_coeff = provider.moe_input_jitter_eps = None
    # The overlap gathers and scatters outside the linears, where an adapter does not see it.
    provider.moe_shared_expert_overlap = False
    if provider.num_moe_experts:
        provider.moe_grouped_gemm = True
    if config.recompute:
        provider.recompute_granularity = "full"
        provider.recompute_method, provider.recompute_num_layers = "uniform", 1
    provider.mtp_num_layers = None


def _set_torch_backend(provider: Any) -> None:
    from megatron.core.transformer.enums import AttnBackend  # noqa: PLC0415 - patched first

    from megatrain_kernels.torch_backend.provider import use_torch_backend  # noqa: PLC0415

    use_torch_backend()
    provider.attention_backend = AttnBackend.auto
    provider.persist_layer_norm = False
    for name in UNFUSED:
        if hasattr(provider, name):
            setattr(provider, name, False)
    # The one fused activation that the torch back end has.
    provider.bias_activation_fusion = (
        provider.activation_func is torch.nn.functional.silu
        and bool(provider.gated_linear_unit)
        and provider.activation_func_clamp_value is None
        and not provider.glu_linear_offset
    )
