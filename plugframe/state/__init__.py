"""From the user's objects to a state tree and back; the checkpoint manager."""
