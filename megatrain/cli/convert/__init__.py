"""`megatrain convert`: checkpoints and adapters from one format, layout or shape to another."""
