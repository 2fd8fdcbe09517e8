"""An alias for the best GPU of this machine, of any vendor."""

from plugframe import Plugin

plugin = Plugin(best_of="gpu", summary="The best GPU of this machine, of whatever make.")
