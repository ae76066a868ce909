"""Requests from their acceptance to their result: order, fairness, passes, futures."""
