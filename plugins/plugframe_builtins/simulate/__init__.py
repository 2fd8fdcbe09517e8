"""Simulate a large job on one machine: one real rank, and others assumed to be like it."""

from plugframe import Option, Plugin

as_environment = Plugin(
    factory="plugframe_builtins.simulate.environment:Simulated",
    summary="One rank of a job of any size, alone: its memory, its time, what it would send, and wrong settings.",
    options=(Option("ranks", int, None, "Ranks of the job.", minimum=1),),
    provides=("simulated",),
    implies={"collective": "simulate", "extension": "costs"},
)

as_collective = Plugin(
    factory="plugframe_builtins.simulate.collective:SimulatedCollective",
    summary="Sends nothing: every other rank is assumed to hold the tensors of this one. For environment simulate.",
    provides=("process-group", "simulated"),
)
