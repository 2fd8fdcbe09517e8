"""The minimal core: from names to a running pipeline of plugins. It imports hooks and errors alone."""
