"""A strategy with a name that somebody else chose, too."""

from plugframe import Plugin

plugin = Plugin(factory="plugframe_twin.strategy:Twin", summary="The other acme.")
