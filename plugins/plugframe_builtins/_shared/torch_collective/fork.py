"""Processes forked beside a process group: the workers of a loader, above all."""

from __future__ import annotations

import functools
import gc
import os


@functools.cache
def keep_groups_of_the_parent() -> None:
    """From now on, keep processes that are forked from collecting what their parent left behind.

    A process group whose last reference is part of a cycle is destroyed by the garbage collector, wherever that
    runs next. In a forked child its destructor waits for ever, for threads that only the parent has. What was there
    before the fork is therefore not the child's to collect; what the child makes is collected as ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)
