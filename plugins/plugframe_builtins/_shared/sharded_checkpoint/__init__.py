"""Write and read checkpoints whose tensors are divided among ranks."""
