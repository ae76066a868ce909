"""`megatrain bench`: the same work here and on Transformers + PEFT, measured in one run."""
