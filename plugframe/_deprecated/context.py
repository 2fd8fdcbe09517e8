"""The former path of `plugframe.Context`, for plugins of API 1."""

import warnings

from plugframe.hooks.context import Context as Context

warnings.warn("plugframe.context is deprecated: use 'from plugframe import Context'.", DeprecationWarning, stacklevel=2)
