"""Log the norm of the gradients."""

from plugframe import Option, Plugin

plugin = Plugin(
    factory="plugframe_builtins.grad_norm.extension:GradNorm",
    summary="Adds the norm of the gradients, before clipping, to what the script logs.",
    options=(
        Option("norm_type", float, 2.0, "The order of the norm, where the script does not clip.", above=0),
        Option("every", int, 1, "Optimizer steps between two norms, where the script does not clip.", minimum=1),
    ),
)
