"""Who asks: keys, what they may do, and how often."""
