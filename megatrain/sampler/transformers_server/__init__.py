"""The engine's process: Transformers and PEFT, with continuous batching.  Needs torch."""
