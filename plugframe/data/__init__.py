"""Loaders, sharding, shuffling and seeding."""
