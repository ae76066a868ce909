"""Reinforcement learning around the trainer: rewards, advantages and metrics.  No torch."""
