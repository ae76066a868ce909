"""What the service comes back from: sessions, runs, requests, results, keys, checkpoints."""
