"""Collect the state of the user's objects into a tree, restore it, and manage the checkpoints of a run."""
