"""For each rule a plugin that breaks it: its suite fails, with a message that begins with the rule."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from plugframe.testing.contracts import (
    accelerator,
    base,
    checkpoint,
    collective,
    collective_ranks,
    environment,
    extension,
    launcher,
    logger,
    precision,
    strategy,
    strategy_ranks,
)

#: Kind and class of a wrong plugin, the rule it breaks, and the test that must say so. "Right" ones break none: of
#: those every test is run, and passes.
WRONG: list[tuple[str, str, str, str]] = [
    ("strategy", "Unpublished", base.PUBLISHED, "the_descriptor_is_light"),
    ("strategy", "Heavy", base.LIGHT, "the_descriptor_is_light"),
    ("strategy", "Mute", base.DESCRIBED, "the_descriptor_describes_it"),
    ("strategy", "Raises", base.MADE, "every_hook_is_provided"),
    ("strategy", "Unmarked", base.COMPLETE, "every_hook_is_provided"),
    ("strategy", "Renamed", base.COMPLETE, "every_hook_is_provided"),
    ("strategy", "Lacks", base.COMPLETE, "every_hook_is_provided"),
    ("strategy", "Misnamed", base.OPTIONS, "declared_options_are_what_it_takes"),
    ("strategy", "Unsent", base.SENT, "it_can_be_sent_to_the_ranks"),
    ("strategy", "Common", base.ITSELF, "two_of_it_share_nothing"),
    ("strategy", "Alone", strategy_ranks.LAW_6, "on_ranks[gradients_are_those_of_the_whole_batch-2]"),
    ("strategy", "Halves", strategy_ranks.LAW_7, "on_ranks[clipping_is_that_of_the_whole-2]"),
    ("strategy", "Finite", strategy_ranks.LAW_7, "on_ranks[gradients_that_are_not_finite_are_an_error-2]"),
    ("strategy", "Repeats", strategy_ranks.LAW_8, "on_ranks[evaluation_sees_every_sample_once-2]"),
    ("strategy", "Drifts", strategy_ranks.STATISTICS, "on_ranks[running_statistics_are_equal-2]"),
    ("strategy", "Leaves", strategy_ranks.LAW_9, "on_ranks[nothing_is_left_behind-2]"),
    ("strategy", "Restarts", strategy_ranks.LAW_4, "on_ranks[a_run_goes_on_from_its_checkpoint-2]"),
    ("strategy", "Unequal", strategy_ranks.START, "on_ranks[it_begins_with_rank_zeros_weights-2]"),
    ("strategy", "Prefixes", strategy_ranks.STATE, "on_ranks[a_state_is_the_users-2]"),
    ("strategy", "Adds", strategy_ranks.OWN, "on_ranks[objects_stay_the_users_own-2]"),
    ("strategy", "Again", strategy_ranks.ONCE, "on_ranks[wrappers_see_each_call_once-2]"),
    ("strategy", "Insists", strategy_ranks.SKIPPED, "on_ranks[a_skipped_step_is_no_step-2]"),
    ("strategy", "Remembers", strategy_ranks.APART, "on_ranks[jobs_are_apart-2]"),
    ("strategy", "Loses", strategy_ranks.LOCAL, "on_ranks[a_local_backward_needs_no_other_rank-2]"),
    ("strategy", "Talks", strategy.DESCRIBED, "it_can_be_described_before_it_is_set_up"),
    ("strategy", "Curt", strategy.BACKWARD, "backward_takes_what_its_caller_gives"),
    ("strategy", "Ignores", base.LAW_10, "an_unknown_option_is_refused"),
    ("collective", "Drops", collective_ranks.LAW_5, "on_ranks[gathering_stacks-1]"),
    ("collective", "Writes", collective_ranks.INPUTS, "on_ranks[shapes_are_kept-1]"),
    ("collective", "Joins", collective_ranks.LAW_5, "on_ranks[gathering_stacks-2]"),
    ("collective", "Adds", collective_ranks.REDUCED, "on_ranks[reductions_compute_their_names-2]"),
    ("collective", "Sums", collective_ranks.REDUCED, "on_ranks[reductions_compute_their_names-2]"),
    ("collective", "Swaps", collective_ranks.REDUCED, "on_ranks[reductions_compute_their_names-2]"),
    ("collective", "Widens", collective_ranks.REDUCED, "on_ranks[reductions_compute_their_names-2]"),
    ("collective", "Turns", collective_ranks.LAW_5, "on_ranks[gathering_stacks-2]"),
    ("collective", "Indexes", collective_ranks.GROUPS, "on_ranks[groups_hold_their_members-2]"),
    ("collective", "Positions", collective_ranks.GROUPS, "on_ranks[sources_in_a_group_are_ranks_of_the_job-2]"),
    ("collective", "Converts", collective_ranks.RECEIVED, "on_ranks[messages_arrive-2]"),
    ("collective", "Invents", collective_ranks.SENT, "on_ranks[messages_have_two_equal_ends-2]"),
    ("collective", "Pretends", collective_ranks.IN_TIME, "on_ranks[a_message_without_its_other_end_is_told_in_time-2]"),
    ("collective", "Shuffles", collective_ranks.ALL_TO_ALL, "on_ranks[rows_go_to_their_ranks-2]"),
    ("collective", "Keeps", collective_ranks.ALL_TO_ALL, "on_ranks[any_number_of_rows_goes_to_a_rank-2]"),
    ("collective", "Fits", collective_ranks.ALL_TO_ALL, "on_ranks[rows_that_do_not_fit_are_an_error_on_every_rank-2]"),
    ("collective", "Detaches", collective_ranks.GRADIENTS, "on_ranks[gradients_return_with_their_rows-2]"),
    ("collective", "Anonymous", collective_ranks.UNSUPPORTED, "on_ranks[rows_go_to_their_ranks-2]"),
    ("collective", "First", collective_ranks.SCATTERED, "on_ranks[rows_are_scattered-2]"),
    ("collective", "Spreads", collective_ranks.GATHERED, "on_ranks[objects_are_gathered_by_one_rank-2]"),
    ("collective", "Terse", collective_ranks.MISMATCH, "on_ranks[unequal_tensors_are_an_error_on_every_rank-2]"),
    ("collective", "Rounds", collective_ranks.REFUSED, "on_ranks[wrong_reductions_are_refused-2]"),
    ("collective", "Cuts", collective_ranks.GRADIENTS, "on_ranks[gradients_flow_back-2]"),
    ("collective", "Reverses", collective_ranks.OBJECTS, "on_ranks[objects_travel-2]"),
    ("collective", "Everyone", collective_ranks.GROUPS, "on_ranks[groups_hold_their_members-2]"),
    ("collective", "Passes", collective_ranks.BARRIERS, "on_ranks[barriers_wait-2]"),
    ("collective", "Nameless", collective_ranks.BARRIERS, "on_ranks[who_is_missing_at_a_barrier_is_named-2]"),
    ("collective", "Alone", collective_ranks.IN_TIME, "on_ranks[who_does_not_come_is_told_in_time-2]"),
    ("collective", "Hides", collective_ranks.CAPABLE, "on_ranks[its_process_group_is_told-2]"),
    ("collective", "Wide", collective_ranks.LOOPBACK, "on_ranks[nothing_listens_beyond_loopback-2]"),
    ("collective", "Leaves", collective_ranks.LAW_9, "on_ranks[it_connects_again_and_again-2]"),
    ("collective", "Single", collective.ONE_RANK, "more_ranks_than_it_connects_are_refused"),
    ("accelerator", "Right", "", ""),
    ("accelerator", "Counts", accelerator.ASKED, "it_can_be_asked_anywhere"),
    ("accelerator", "Adds", accelerator.DEVICES, "devices_are_read"),
    ("accelerator", "Settles", accelerator.REFUSED, "wrong_devices_are_refused"),
    ("accelerator", "Other", accelerator.DEVICE, "an_index_stands_for_a_device"),
    ("accelerator", "Narrow", accelerator.DTYPES, "dtypes_it_supports_are_computed_in"),
    ("accelerator", "Unheard", accelerator.AUTOCAST, "autocast_knows_its_type"),
    ("accelerator", "Smoke", accelerator.BACKEND, "its_backend_is_one"),
    ("accelerator", "Copies", accelerator.MOVED, "batches_are_moved"),
    ("accelerator", "Draws", accelerator.SEEDED, "seeds_and_states_repeat_numbers"),
    ("accelerator", "Shrinks", accelerator.MEMORY, "memory_figures_are_bytes"),
    ("accelerator", "Indexed", accelerator.TRAINING, "a_run_computes_on_its_device"),
    ("accelerator", "Leaves", accelerator.CLEAN, "set_up_and_tear_down_leave_nothing"),
    ("precision", "Right", "", ""),
    ("precision", "Full", precision.DTYPES, "a_forward_computes_in_the_dtype"),
    ("precision", "Copies", precision.IN_PLACE, "a_module_is_converted_in_place"),
    ("precision", "Unlisted", precision.LISTED, "a_module_is_converted_in_place"),
    ("precision", "Halves", precision.UNTOUCHED, "what_is_no_float_tensor_is_untouched"),
    ("precision", "Raw", precision.RETURNED, "a_forward_computes_in_the_dtype"),
    ("precision", "Settles", precision.REFUSED, "what_the_device_cannot_compute_is_refused"),
    ("precision", "Scaled", precision.GRADIENTS, "gradients_are_true_to_size"),
    ("precision", "Twice", precision.STEPS, "steps_are_those_of_plain_torch"),
    ("precision", "Steps", precision.OVERFLOW, "an_overflow_is_skipped_or_shown"),
    ("precision", "Drops", precision.CLOSURES, "a_closure_is_evaluated_or_refused"),
    ("precision", "Forgets", precision.STATE, "its_state_comes_back"),
    ("precision", "Common", precision.APART, "two_of_them_do_not_meddle"),
    ("precision", "Stands", precision.TRAINING, "a_run_ends_near_plain_torch"),
    ("precision", "Leaves", precision.CLEAN, "set_up_and_tear_down_leave_nothing"),
    ("checkpoint", "Right", "", ""),
    ("checkpoint", "Narrows", checkpoint.ROUND_TRIP, "what_was_saved_comes_back"),
    ("checkpoint", "Unverified", checkpoint.VERIFIED, "damage_is_refused"),
    ("checkpoint", "Unpickles", checkpoint.NO_CODE, "code_in_a_file_is_never_run"),
    ("checkpoint", "InPlace", checkpoint.ATOMIC, "a_process_that_dies_while_saving_leaves_what_was_there"),
    ("checkpoint", "Silent", checkpoint.ALIKE, "all_ranks_hear_of_an_error"),
    ("checkpoint", "Litters", checkpoint.CLEAN, "a_save_takes_the_place_of_the_one_before"),
    ("checkpoint", "Mumbles", checkpoint.REFUSED, "what_cannot_be_saved_is_refused_by_key"),
    ("checkpoint", "Lazy", checkpoint.WAIT, "a_handle_says_when_the_checkpoint_is_whole"),
    ("checkpoint", "Overwrites", checkpoint.PATHS, "nothing_and_something_else_are_refused"),
    ("checkpoint", "Fibs", checkpoint.TOLD, "it_can_say_what_it_holds"),
    ("checkpoint", "Sticks", checkpoint.SHARDED, "any_number_of_ranks_loads_it"),
    ("environment", "Right", "", ""),
    ("environment", "Everywhere", environment.DETECTED, "it_is_detected_by_its_variables_alone"),
    ("environment", "Swapped", environment.WORLD, "every_rank_knows_its_place"),
    ("environment", "Crashes", environment.TOLD, "a_wrong_variable_is_told"),
    ("environment", "Agrees", environment.VALIDATED, "what_was_asked_for_must_be_what_was_started"),
    ("environment", "Timid", environment.CHOSEN, "auto_chooses_it"),
    ("environment", "Stale", environment.MET, "the_ranks_meet"),
    ("environment", "Requeues", environment.REQUEUED, "without_a_job_nothing_is_requeued"),
    ("environment", "Sets", environment.CLEAN, "every_rank_knows_its_place"),
    ("launcher", "Right", "", ""),
    ("launcher", "OnlyOne", launcher.STARTED, "each_rank_is_started_once"),
    ("launcher", "NoResult", launcher.RESULT, "it_returns_what_rank_0_returned"),
    ("launcher", "Loses", launcher.VARIABLES, "variables_reach_the_ranks"),
    ("launcher", "Strips", launcher.VARIABLES, "variables_reach_the_ranks"),
    ("launcher", "Miscounts", launcher.RANKS, "ranks_are_numbered"),
    ("launcher", "Swallows", launcher.FAILED, "a_rank_that_fails_ends_the_job"),
    ("launcher", "One", launcher.CODE, "an_exit_code_is_kept"),
    ("launcher", "Nameless", launcher.CODE, "an_exit_code_is_kept"),
    ("launcher", "Abandons", launcher.ENDED, "every_rank_has_ended"),
    ("launcher", "Deaf", launcher.LOGGED, "output_is_logged_or_refused"),
    ("launcher", "Leaves", launcher.CLEAN, "nothing_is_left_behind"),
    ("launcher", "Stumbles", launcher.ABLE, "what_it_cannot_launch_is_refused"),
    ("logger", "Right", "", ""),
    ("logger", "Old", "", ""),
    ("logger", "Drops", logger.RECORDED, "many_steps_are_recorded"),
    ("logger", "LosesOne", logger.RECORDED, "every_metric_is_recorded"),
    ("logger", "Swaps", logger.STEPS, "steps_are_kept"),
    ("logger", "Backwards", logger.STEPS, "order_is_kept"),
    ("logger", "Rounds", logger.EXACT, "values_are_exact"),
    ("logger", "Prints", logger.EXACT, "values_are_exact"),
    ("logger", "Finite", logger.EXACT, "values_are_exact"),
    ("logger", "FromOne", logger.COUNTED, "calls_without_a_step_are_counted"),
    ("logger", "EveryRank", logger.RANK_ZERO, "only_rank_zero_writes"),
    ("logger", "Early", logger.TOLD, "files_are_where_they_were_told_to_be"),
    ("logger", "OneFile", logger.APART, "runs_one_after_the_other_do_not_mix"),
    ("logger", "Waits", logger.FLUSHED, "the_last_metrics_are_written"),
    ("logger", "Gives", logger.FLUSHED, "the_last_metrics_are_written"),
    ("logger", "Cheerful", logger.FAILED, "a_failed_run_is_recorded_as_failed"),
    ("logger", "Mute", logger.HYPERPARAMS, "hyperparameters_are_recorded"),
    ("logger", "Discards", logger.ARTIFACTS, "artifacts_are_recorded"),
    ("logger", "Nags", logger.ARTIFACTS, "artifacts_are_recorded"),
    ("logger", "Overwrites", logger.RESUMED, "a_resumed_run_goes_on"),
    ("logger", "Renames", logger.RESUMED, "a_resumed_run_goes_on"),
    ("logger", "Twice", logger.CLOSED, "tear_down_may_come_early_or_twice"),
    ("logger", "Open", logger.CLEAN, "nothing_is_left_behind"),
    ("extension", "Right", "", ""),
    ("extension", "Provides", extension.WRAPS, "it_only_wraps_and_listens"),
    ("extension", "Repeats", extension.ONCE, "each_call_is_made_once"),
    ("extension", "Forgets", extension.RESULT, "the_result_is_what_the_hook_gave"),
    ("extension", "Swallows", extension.RAISED, "what_a_hook_raises_passes_through"),
    ("extension", "Nudges", extension.TRAINING, "a_run_ends_with_the_same_weights"),
    ("extension", "OnceOnly", extension.BALANCED, "tear_down_gives_back_what_launch_took"),
    ("extension", "Leaves", extension.CLEAN, "one_run_after_another"),
    ("extension", "Amnesia", extension.OBJECT, "a_script_may_save_the_object"),
    ("extension", "Counts", "", ""),
    ("extension", "Unloaded", extension.STATE, "its_state_comes_back_from_a_checkpoint"),
    ("extension", "Grows", extension.STATE, "its_state_comes_back_from_a_checkpoint"),
    ("extension", "Objects", extension.STATE, "its_state_comes_back_from_a_checkpoint"),
    ("extension", "Differs", extension.EQUAL, "on_ranks_its_state_comes_back"),
    ("extension", "Skips", extension.TRAINING, "a_run_ends_with_the_same_weights"),
]

if not sys.platform.startswith("linux"):
    WRONG = [row for row in WRONG if row[2] != collective_ranks.LOOPBACK]  # elsewhere the system does not tell

#: Not run for "Right" ones: they start processes, and those of the built-ins show as much.
LONG = (
    "dies_while",
    "that_fails_leaves",
    "all_ranks_hear",
    "str_or_a_path",
    "any_number_of_ranks",
    "on_ranks_it_leaves",
    "on_ranks_its_state",
    "can_be_asked_anywhere",
)

SUITES = """
import json
from pathlib import Path

from plugframe.testing import (
    AcceleratorContract, CheckpointContract, CollectiveContract, EnvironmentContract, ExtensionContract,
    LauncherContract, LoggerContract, PrecisionContract, StrategyContract,
)
from plugframe.testing.contracts.base import PluginContract
from plugframe_wrong.together import reports_of

kept = {}

def records(self, logger):
    return [tuple(json.loads(line)) for line in Path(logger.path).read_text(encoding="utf-8").splitlines()]

def failed(self, logger):
    return Path(f"{logger.path}.failed").exists()

def report(self, num_ranks, *more):
    if (self.kind, num_ranks) not in kept:
        alike = [cls for cls in globals().values() if getattr(cls, "job", None) == (self.kind, num_ranks)]
        kept[self.kind, num_ranks] = reports_of([cls() for cls in alike], num_ranks, *more)
    return {self.only: kept[self.kind, num_ranks][self.spec]}

def variables(self, *, num_nodes, ranks_per_node, rank, port):
    prefix = self.spec.upper().replace("-", "_")
    figures = (rank, num_nodes * ranks_per_node, rank % ranks_per_node, ranks_per_node, port)
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "PORT")
    return {f"{prefix}_{name}": str(figure) for name, figure in zip(names, figures)}

"""


class Reports:
    """Keeps what failed, by the class it failed in."""

    def __init__(self) -> None:
        self.failed: dict[str, list[str]] = {}
        self.ran: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out the tests a wrong plugin has nothing to do with: all of them would take minutes."""
        wanted = {f"Test_{kind}_{name}": f"test_{test}" for kind, name, _, test in WRONG}
        items[:] = [item for item in items if _wanted(item.name, wanted[item.nodeid.split("::")[1]])]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure's message, a pass by name."""
        suite = report.nodeid.split("::")[1]
        if report.failed:
            self.failed.setdefault(suite, []).append(f"{report.nodeid.split('::')[-1]}: {report.longreprtext}")
        if report.when == "call":
            self.ran.add(suite)


def _wanted(name: str, test: str) -> bool:
    return name.startswith(test) and (test != "test_" or not any(long in name for long in LONG))


@pytest.fixture(scope="module")
def reports(installed: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Run all suites over all wrong plugins, in a pytest inside this one."""
    folder = tmp_path_factory.mktemp("wrong")
    text = SUITES
    for kind, name, rule, test in WRONG:
        suite = "PluginContract" if rule in vars(base).values() else f"{kind.capitalize()}Contract"
        text += f"class Test_{kind}_{name}({suite}):\n    kind = '{kind}'\n    spec = 'wrong-{name.lower()}'\n"
        own_methods = {"logger": "read = records", "environment": "variables = variables"}
        own_methods["logger"] += "; has_failed = failed" if name != "Old" else ""
        text += f"    {own_methods.get(kind, '')}\n"
        if on_ranks := re.fullmatch(r"on_ranks\[(\w+)-(\d)\]", test):
            text += f"    only, job, reports = '{on_ranks[1]}', ('{kind}', {on_ranks[2]}), report\n"
    (folder / "test_suites_of_wrong_plugins.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    found = Reports()
    own = str(installed("wrong"))
    options = ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:faulthandler", "--capture=no"]
    rounding = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(own)
        inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        patch.setenv("PYTHONPATH", os.pathsep.join([own, *inherited]))
        patch.setenv("PYTEST_CURRENT_TEST", "the inner one removes it")
        patch.chdir(folder)
        pytest.main([*options, "-c", str(folder / "pytest.ini"), "--rootdir", str(folder), str(folder)], [found])
    torch.set_float32_matmul_precision(rounding)
    return found


@pytest.mark.parametrize(("kind", "name", "rule", "test"), WRONG, ids=[f"{row[0]}-{row[1]}" for row in WRONG])
def test_a_broken_rule_is_named(reports: Reports, kind: str, name: str, rule: str, test: str) -> None:
    """The suite of a plugin that breaks a rule fails with that rule; one that breaks none passes."""
    suite = f"Test_{kind}_{name}"
    failed = reports.failed.get(suite, [])
    assert suite in reports.ran, f"{suite} did not run"
    if not rule:
        assert not failed, "\n".join(failed)
        return
    texts = [text.partition(": ")[2] for text in failed]
    assert any(text.startswith(f"{rule}: ") for text in texts), "\n".join(failed)


#: Rules that no plugin can break: the core refuses by what a descriptor says, before it asks the plugin.
OF_THE_CORE = {strategy.ONE_RANK, strategy.SUPPORTED}


@pytest.mark.parametrize(
    "suite",
    [
        accelerator,
        base,
        checkpoint,
        collective,
        collective_ranks,
        environment,
        extension,
        launcher,
        logger,
        precision,
        strategy,
        strategy_ranks,
    ],
)
def test_each_rule_has_a_plugin_that_breaks_it(suite: ModuleType) -> None:
    """No suite has a rule that nothing shows to be looked after."""
    texts = [value for value in vars(suite).values() if isinstance(value, str)]
    rules = {text for text in texts if re.fullmatch(r"[A-Z][^:\n]+ \(.+\)", text)} - OF_THE_CORE
    kind = suite.__name__.rpartition(".")[2].partition("_")[0]
    assert rules == {rule for of, _, rule, _ in WRONG if rule and (of == kind or suite is base)} & rules
    assert rules
