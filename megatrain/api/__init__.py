"""The Python API: `initialize` and `MegatronModel`.  Importing it imports no torch."""
