"""Supported helpers for tests: tiny real models, and a pool of rank processes."""
