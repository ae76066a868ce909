"""`megatrain quickstart`: the whole path on a small model, from checkpoint to proven adapter."""
