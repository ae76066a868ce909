"""The Tinker API's endpoints."""
