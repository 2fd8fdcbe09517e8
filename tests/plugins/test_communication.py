"""What is sent through the collective is seen by the call log, and by extensions that time, compare or refuse it."""

from __future__ import annotations

import importlib

import pytest

from plugframe.diagnostics.instrument import RECORDED_HOOKS
from plugframe.hooks import KINDS, Plugin
from plugframe.hooks.markers import marks_of
from plugframe_builtins import advise, costs, lockstep, oom_retry, profiler

#: Hooks in which ranks wait for each other; the gather of later values is asynchronous.
COMMUNICATION = set(KINDS["collective"].hooks) - {
    "collective_setup",
    "collective_teardown",
    "collective_gather_later",
    "collective_new_group",
    "collective_process_group",
}


def wrapped_by(plugin: Plugin) -> set[str]:

    module, _, name = plugin.factory.partition(":")
    extension = object.__new__(getattr(importlib.import_module(module), name))
    return {hook for hook in KINDS["collective"].hooks if (marks_of(extension, hook) or {}).get("wrapper")}


@pytest.mark.parametrize(
    "plugin",
    [advise.plugin, costs.plugin, profiler.plugin, oom_retry.plugin],
    ids=["advise", "costs", "profiler", "oom"],
)
def test_an_extension_sees_every_call(plugin: Plugin) -> None:
    """No hook in which ranks wait is left out."""
    assert wrapped_by(plugin) == COMMUNICATION


def test_the_call_log_has_every_call() -> None:
    """No hook in which ranks wait is missing in a hang report."""
    assert {hook for hook in RECORDED_HOOKS if hook.startswith("collective_")} == COMMUNICATION


def test_lockstep_compares_every_call_of_all_ranks() -> None:
    """Only messages of two ranks, and the barrier that names missing ranks itself, are left out."""
    alone = {"collective_send", "collective_recv", "collective_monitored_barrier"}
    assert wrapped_by(lockstep.plugin) == COMMUNICATION - alone
