"""vLLM as a sampler: its own server, in an environment and processes of its own, over HTTP."""
