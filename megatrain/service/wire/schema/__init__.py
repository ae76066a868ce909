"""Requests and replies of Tinker's API, as pydantic models by group of endpoints."""
