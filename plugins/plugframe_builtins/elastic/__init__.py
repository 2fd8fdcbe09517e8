"""Launch and supervise ranks with torch's elastic agent, the engine behind ``torchrun``."""

from __future__ import annotations

from plugframe import Option, Plugin

_FACTORY = "plugframe_builtins.elastic.launcher:Elastic"

plugin = Plugin(
    factory=_FACTORY,
    summary="Starts scripts and functions, on one node or several; restarts them on request.",
    provides=("script", "function"),
    priority=100,
    options=(Option("start_method", str, None, "Start of the ranks; unset: scripts fork.", ("spawn", "fork")),),
)
spawn = Plugin(
    factory=_FACTORY,
    summary="Starts a function in fresh interpreters: it must be importable.",
    provides=("function",),
    priority=50,
    preset={"start_method": "spawn"},
)
fork = Plugin(
    factory=_FACTORY,
    summary="Starts a function in copies of this process: any function will do, also in a notebook.",
    provides=("function", "interactive"),
    priority=40,
    preset={"start_method": "fork"},
)
