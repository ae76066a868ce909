"""`megatrain data`: what is in a data set."""
