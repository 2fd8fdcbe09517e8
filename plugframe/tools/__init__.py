"""Commands besides ``plugframe run``, found by entry point."""
