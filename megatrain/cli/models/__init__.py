"""`megatrain models`: which architectures hold, and what of each."""
