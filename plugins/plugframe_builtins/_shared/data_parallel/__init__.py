"""Average gradients over ranks that all hold the complete model."""
