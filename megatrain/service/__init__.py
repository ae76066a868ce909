"""The service: the Tinker API for many tenants, over HTTP.  No torch."""
