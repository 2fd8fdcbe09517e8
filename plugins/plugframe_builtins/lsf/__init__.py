"""Ranks launched by LSF's jsrun."""

from plugframe import Plugin

plugin = Plugin(
    factory="plugframe_builtins.lsf.environment:LSF",
    summary="LSF: the tasks of jsrun.",
    priority=50,
    variables=("LSB_JOBID", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    own_variables=("JSM_NAMESPACE_*",),
)
