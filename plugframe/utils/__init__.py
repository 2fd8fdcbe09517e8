"""Helpers shared by plugins and the framework."""
