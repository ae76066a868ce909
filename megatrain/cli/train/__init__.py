"""`megatrain train`: a run from one TOML file, alone, on ranks of its own, or under torchrun."""
