"""What plugins must do, as tests: a suite for each kind, to be subclassed by the author of a plugin."""
