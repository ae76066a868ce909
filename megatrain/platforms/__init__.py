"""The only code that knows a device and its quirks."""
