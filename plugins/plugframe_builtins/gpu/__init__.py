"""A name for the best GPU there is, whoever made it."""

from plugframe import Plugin

plugin = Plugin(best_of="gpu", summary="The best GPU of this machine, of whatever make.")
