"""Read checkpoints of every format: index, verify, and load completely or by shard."""
