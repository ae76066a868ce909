"""Checkpoints' files: in a folder, or wherever fsspec reaches."""
