"""How torch and its backends say that another rank is gone, or late."""

from __future__ import annotations

#: Exceptions with which a rank notices that another one has gone.
NETWORK_TYPES = frozenset(
    {"DistNetworkError", "DistBackendError", "DistStoreError", "ConnectionError", "BrokenPipeError", "RankLostError"}
)
#: The same, where the type is a plain RuntimeError: its connection is lost,
LOST_TEXTS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "Read error",
    "caused pair closure",
)
#: or it has not come in time.
LATE_TEXTS = ("Timed out waiting",)
