"""Batch, loss, optimizer and the training step that puts them together: read step.py first."""
