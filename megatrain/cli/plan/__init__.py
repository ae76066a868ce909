"""`megatrain plan`: which layouts fit, and which is likely the fastest."""
