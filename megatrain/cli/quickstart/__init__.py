"""`megatrain quickstart`: the whole path on a small model, from a checkpoint to a proven adapter."""
