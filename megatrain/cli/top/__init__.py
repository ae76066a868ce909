"""`megatrain top`: what a running driver and its ranks do, live."""
