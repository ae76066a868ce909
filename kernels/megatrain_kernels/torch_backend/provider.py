"""Megatron's BackendSpecProvider in plain torch, and how it takes Transformer Engine's place."""

import sys
from functools import partial
from typing import Any

from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP

from megatrain_kernels.torch_backend.activation import (
    bias_swiglu_impl,
    weighted_bias_swiglu_impl,
)
from megatrain_kernels.torch_backend.core_attention import TorchCoreAttention
from megatrain_kernels.torch_backend.delta_net import use_torch_delta_net
from megatrain_kernels.torch_backend.gemma import TorchGemma2Attention, TorchGemma3Attention
from megatrain_kernels.torch_backend.latent import TorchQKNormConfigResolver
from megatrain_kernels.torch_backend.linears import (
    TorchColumnParallelGroupedLinear,
    TorchLinear,
    TorchRowParallelGroupedLinear,
)
from megatrain_kernels.torch_backend.norms import TorchLayerNormColumnParallelLinear, TorchNorm
from megatrain_kernels.torch_backend.post_norm import TorchRowParallelLinearLayerNorm
from megatrain_kernels.torch_backend.rotary import packed_rotary
from megatrain_kernels.torch_backend.split_norm import TorchFullDimRMSNorm, TorchHeadsNorm

REPLACEMENTS: dict[str, type] = {
    "TENorm": TorchNorm,
    "TELayerNormColumnParallelLinear": TorchLayerNormColumnParallelLinear,
    "TEColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear,
    "TEDotProductAttention": TorchCoreAttention,
    "DotProductAttention": TorchCoreAttention,
    "TELinear": TorchLinear,
    "TEColumnParallelGroupedLinear": TorchColumnParallelGroupedLinear,
    "TERowParallelGroupedLinear": TorchRowParallelGroupedLinear,
    "LayerNormImpl": TorchNorm,
    "LNImpl": TorchNorm,
    "WrappedTorchNorm": TorchNorm,
    "TERowParallelLinearLayerNorm": TorchRowParallelLinearLayerNorm,
    "Gemma2FlexDotProductAttention": TorchGemma2Attention,
    "Gemma3TEDotProductAttention": TorchGemma3Attention,
    "_FullDimRMSNorm": TorchFullDimRMSNorm,
    "QKNormConfigResolver": TorchQKNormConfigResolver,
}
"""What stands for each of Transformer Engine's classes where a specification names it, and for
classes of Megatron-Bridge that need it or know no packed sequences."""

PARALLELISM = {
    "TorchColumnParallelGroupedLinear": "column",
    "TorchRowParallelGroupedLinear": "row",
    "TorchCoreAttention": "column",
    "TorchFullDimRMSNorm": "column",
    "TorchRowParallelLinearLayerNorm": "row",
    "TorchLinear": "replicated",
}
"""How Bridge is to split each class's parameters; classes with Norm in their name it knows."""


class TorchSpecProvider(BackendSpecProvider):
    """The same modules as TESpecProvider, in plain torch."""

    def linear(self) -> type:
        """Return the linear that is the same on every TP rank."""
        return TorchLinear

    def column_parallel_linear(self) -> type:
        """Return Megatron's own."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return Megatron's own."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Return True: names of parameters are those of the fused layer."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Return the norm and column-parallel linear in one."""
        return TorchLayerNormColumnParallelLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        """Return the norm; which kind is in the model's configuration."""
        return TorchNorm

    def core_attention(self) -> type:
        """Return attention over SDPA."""
        return TorchCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        """Return Megatron's grouped experts over our grouped linears."""
        linears = GroupedMLPSubmodules(
            linear_fc1=TorchColumnParallelGroupedLinear,
            linear_fc2=TorchRowParallelGroupedLinear,
            activation_func=None,
        )
        return partial(TEGroupedMLP, submodules=linears)

    def activation_func(self) -> None:
        """Return None: the activation is the configuration's own function."""
        return


SPEC_MODULES = (
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.experimental_attention_variant_module_specs",
    "megatron.core.models.gpt.moe_module_specs",
    "megatron.core.transformer.multi_token_prediction",
)
"""Where Megatron builds specifications with TESpecProvider."""


FUNCTIONS = (bias_swiglu_impl, weighted_bias_swiglu_impl)
"""What stands for Megatron's functions of the same names."""


def use_torch_backend() -> None:
    """Make every specification that would use Transformer Engine use plain torch.

    Megatron names Transformer Engine's classes in module globals; those are what changes.
    Nothing outside megatron's modules does.
    """
    _provide_specifications()
    names = {**REPLACEMENTS, **{function.__name__: function for function in FUNCTIONS}}
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and module is not None:
            for old in names.keys() & module.__dict__.keys():
                module.__dict__[old] = names[old]
    attention = sys.modules["megatron.core.transformer.attention"].__dict__
    if not hasattr(attention["apply_rotary_pos_emb"], "is_packed"):
        attention["apply_rotary_pos_emb"] = packed_rotary(attention["apply_rotary_pos_emb"])
    _norm_over_all_heads()
    use_torch_delta_net()
    for name, parallelism in PARALLELISM.items():
        AutoMapping.register_module_type(name, parallelism)


def _norm_over_all_heads() -> None:
    """Let OLMoE's layers norm q and k over the heads of all TP ranks."""
    module = sys.modules.get("megatron.bridge.models.olmoe.olmoe_provider")
    if module is None or hasattr(module.__dict__["olmoe_layer_spec"], "over_all_heads"):
        return
    original = module.__dict__["olmoe_layer_spec"]

    def olmoe_layer_spec(config: Any) -> Any:
        spec = original(config)
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = TorchHeadsNorm
        return spec

    vars(olmoe_layer_spec)["over_all_heads"] = True
    for owner in list(sys.modules.values()):
        if getattr(owner, "__name__", "").startswith("megatron.bridge.models.olmoe"):
            owner.__dict__.update(
                {k: olmoe_layer_spec for k, v in owner.__dict__.items() if v is original}
            )


def _provide_specifications() -> None:
    for name in SPEC_MODULES:
        module = sys.modules.get(name)
        if module is not None:
            module.__dict__["TESpecProvider"] = TorchSpecProvider
            if "HAVE_TE" in module.__dict__:
                module.__dict__["HAVE_TE"] = True
