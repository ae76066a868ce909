"""`megatrain bench service`."""
