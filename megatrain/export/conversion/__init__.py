"""Hugging Face checkpoints and Megatron distributed checkpoints into one another, streamed."""
