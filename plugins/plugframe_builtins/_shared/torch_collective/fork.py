"""Safety of forks beside a process group, mainly for loader workers."""

from __future__ import annotations

import functools
import gc
import os


@functools.cache
def keep_groups_of_the_parent() -> None:
    """Keep forked processes from collecting the garbage of their parent, from now on.

    A process group in a reference cycle is destroyed by the garbage collector, wherever that
    runs next. In a forked child its destructor waits for ever, for threads that only the parent has. Objects from
    before the fork are therefore frozen; objects of the child are collected as usual.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=gc.freeze)
