"""Megatron's back end in plain torch, with Transformer Engine's parameter names and shapes.

The only part of megatrain_kernels that imports Megatron.
"""
