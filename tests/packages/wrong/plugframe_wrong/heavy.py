"""A descriptor whose module imports what only its implementation needs."""

import torch

from plugframe import Plugin

plugin = Plugin(factory="plugframe_wrong.strategy:Right", summary=f"Made with torch {torch.__version__}.")
