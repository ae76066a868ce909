"""Versions of adapters on their way to a sampler, proven before they are used."""
