"""Hugging Face checkpoints: found, read slice by slice, and put into a model that is spread out."""
