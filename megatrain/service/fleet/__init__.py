"""A base model's ranks, as the service drives them."""
