"""Four plugins, described; each implementation is a module of its own."""

from plugframe import Plugin

acme = Plugin(
    factory="plugframe_acme.strategy:Acme",
    summary="Gradients averaged one by one after backward.",
    needs={"collective": ("process-group",)},
)
acmechip = Plugin(
    factory="plugframe_acme.accelerator:AcmeChip",
    summary="The processor under another name.",
    devices=("cpu",),
    tags=("acme",),
)
acme_counter = Plugin(factory="plugframe_acme.extension:Counter", summary="Counts backwards.")
acme_logger = Plugin(factory="plugframe_acme.logger:AcmeLogger", summary="Prints metrics.")
