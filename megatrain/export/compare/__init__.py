"""What files hold, and where two of them, or two runs of a model, differ."""
