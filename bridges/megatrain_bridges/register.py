"""Register every family of this package with AutoBridge: importing a module does it, once."""

from megatrain_bridges import ernie4_5, glm, kimi, mixtral, phi3, qwen2_moe, towers

FAMILIES = (ernie4_5, glm, kimi, mixtral, phi3, qwen2_moe, towers)
"""Modules with bridges; megatron-bridge must be importable before this one is imported."""
