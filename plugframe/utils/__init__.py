"""Helpers that plugins and the framework share."""
