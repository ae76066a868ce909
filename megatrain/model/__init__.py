"""AutoBridge to GPTModel, LoRA injection, and the forward pass through Megatron's schedule."""
