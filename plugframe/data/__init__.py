"""Data loaders: sharding, shuffling, seeding, positions and batch weights."""
