"""A Chrome trace: timed events, written to a JSON file for chrome://tracing and Perfetto."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Trace:
    """Complete events, at most `max_events`: the first ones are kept, the others counted."""

    def __init__(self, max_events: int) -> None:
        self.max_events = max_events
        self.dropped = 0
        self._events: list[tuple[str, int, int, int]] = []
        # Durations by the monotonic clock; its origin by the wall clock, so that the ranks' traces line up.
        self._origin_ns = time.time_ns() - time.perf_counter_ns()

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Add an event of this thread, in ``time.perf_counter_ns``."""
        if len(self._events) < self.max_events:
            self._events.append((name, start_ns, end_ns - start_ns, threading.get_native_id()))
        else:
            self.dropped += 1

    def write(self, path: Path, *, rank: int) -> None:
        """Write `rank`'s trace, replacing an existing file."""
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}},
        ]
        events += [
            {
                "ph": "X",
                "name": name,
                "cat": name.partition("_")[0],
                "pid": rank,
                "tid": thread,
                "ts": (self._origin_ns + start_ns) / 1000,
                "dur": duration_ns / 1000,
            }
            for name, start_ns, duration_ns, thread in self._events
        ]
        about = {"rank": rank, "max_events": self.max_events, "dropped_events": self.dropped}
        trace = {"traceEvents": events, "displayTimeUnit": "ms", "metadata": about}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(trace), encoding="utf-8")
