"""Rows of well-known data sets to standard rows."""
