"""`megatrain bench convert`: whole checkpoints to Megatron and back, here and by Bridge."""
