"""What was trained, as files that others read: adapters and merged checkpoints, each verified."""
