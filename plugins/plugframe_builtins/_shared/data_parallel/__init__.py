"""Data parallelism over ranks that hold complete replicas of the model."""
