"""LoRA adapters as files: read, rewritten, merged and extracted, without building a base model."""
