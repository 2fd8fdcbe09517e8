"""A Chrome trace: timed events in memory, then in a JSON file that chrome://tracing and Perfetto read."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any


class Trace:
    """Complete events, at most `max_events` of them: the first ones are kept, the others counted."""

    def __init__(self, max_events: int) -> None:
        self.max_events = max_events
        self.dropped = 0
        self._events: list[tuple[str, int, int, int]] = []
        # Durations by the steady clock; its origin by the wall clock, so that the ranks' traces line up.
        self._origin_ns = time.time_ns() - time.perf_counter_ns()

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        """Keep an event, by ``time.perf_counter_ns``, of this thread."""
        if len(self._events) < self.max_events:
            self._events.append((name, start_ns, end_ns - start_ns, threading.get_native_id()))
        else:
            self.dropped += 1

    def write(self, path: Path, *, rank: int) -> None:
        """Write everything as `rank`'s trace, over what is there."""
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
