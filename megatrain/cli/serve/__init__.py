"""`megatrain serve`."""
