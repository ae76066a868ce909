"""Samplers: engines in processes of their own, behind one interface.  No torch here."""
