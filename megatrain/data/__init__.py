"""Datasets: rows read, mapped, encoded, mixed, packed, and handed out in global batches."""
