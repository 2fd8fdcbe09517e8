"""Module paths, and patterns of plans that name several of them."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern such as ``layers.*.mlp`` matches a path; ``*`` stands for one component, or a part."""
    parts, words = path.split("."), pattern.split(".")
    return len(parts) == len(words) and all(map(fnmatchcase, parts, words))
