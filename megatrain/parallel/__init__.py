"""Layout arithmetic (pure) and process groups; the one reader of Megatron's parallel_state."""
