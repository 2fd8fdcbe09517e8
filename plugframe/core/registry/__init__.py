"""Installed plugins, from distribution metadata, and the policy that refuses some."""
