"""Which plugins are installed, by distribution metadata, and which of them may be imported."""
