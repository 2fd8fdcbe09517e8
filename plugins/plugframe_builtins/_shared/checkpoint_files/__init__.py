"""Reading checkpoints of every form: what lies in them, verified, and read whole or in parts."""
