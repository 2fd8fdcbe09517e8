"""Error types and texts with which torch and its backends report lost or late ranks."""

from __future__ import annotations

#: Exception types that report a lost rank.
NETWORK_TYPES = frozenset(
    {"DistNetworkError", "DistBackendError", "DistStoreError", "ConnectionError", "BrokenPipeError", "RankLostError"}
)
#: Messages of a plain RuntimeError that report a lost connection.
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
#: Messages of a plain RuntimeError that report a timeout.
LATE_TEXTS = ("Timed out waiting",)
