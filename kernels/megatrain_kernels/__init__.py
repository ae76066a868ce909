"""Ops with a plain torch definition, and Megatron's back end built from them."""
