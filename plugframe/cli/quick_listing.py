"""``plugframe list-plugins`` without options, in less time than click takes to be imported."""

from __future__ import annotations

import os
import sys

from plugframe.cli.listing import Statuses, entries_of, row_of, show_rows
from plugframe.core.registry.entry_points import COMMAND, published
from plugframe.core.registry.registry import Registry
from plugframe.errors import PlugframeError

#: What a shell reports for a program ended by Ctrl-C: 128 + SIGINT.
_INTERRUPTED = 130


def show_listing() -> int | None:
    """Print the listing, and return the exit code; None, with nothing printed, where the command has more to say."""
    try:
        registry = Registry.discover()
        command = [entry for entry in published().entries if entry.kind == COMMAND and entry.name == "list-plugins"]
        if not any(entry.builtin and not registry.policy.refusal(entry) for entry in command):
            return None
        statuses = Statuses(registry)
        rows = [row_of(registry, entry, None, statuses) for entry in entries_of(registry, None)]
        if not rows:
            return None
        for note in registry.notes():
            print(f"plugframe: warning: {note}", file=sys.stderr)
        show_rows(rows, check=False)
        sys.stdout.flush()
    except PlugframeError:
        return None  # the command raises it again, and says it
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on, as in `plugframe list-plugins | head`: Python must not flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
