"""The former path of `plugframe.World`, for plugins of API 1."""

import warnings

from plugframe.hooks.world import World as World

warnings.warn("plugframe.world is deprecated: use 'from plugframe import World'.", DeprecationWarning, stacklevel=2)
