"""Run ranks under torch's elastic agent, and report a failure once."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from plugframe.errors import OrderError, PlugframeError, RankFailedError, UnsupportedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import rank as rank_script
from plugframe.launch.elastic import ElasticRendezvous
from plugframe.launch.files import RankFiles, read_error_file
from plugframe.launch.folder import temporary_folder
from plugframe.launch.forked import forks, make_entry_point
from plugframe.launch.function import UNGUARDED, run_function
from plugframe.launch.memory import out_of_memory_kills
from plugframe.launch.monitor import Rank, RankMonitor, is_child
from plugframe.launch.nodes import ElsewhereError, NodeRendezvous
from plugframe.launch.orphan_reaper import OrphanReaper
from plugframe.launch.output import PREFIX, Output
from plugframe.launch.rendezvous import LoopbackRendezvous
from plugframe.launch.report import RankExit, Report, failure_key, find_culprit, report, summary
from plugframe.launch.signals import WARNING, Signals
from plugframe.launch.silence import silence_torch
from plugframe.launch.survivors import Survivors
from plugframe.launch.variables import variables_of_ranks

_MONITOR_S = 0.05
#: Beats between two checks for vanished ranks, and the number of checks that must agree.
_VANISHED_BEATS, _VANISHED_CHECKS = 10, 3


def supervise(job: Job, *, start_method: str | None = None) -> Any:
    """See `plugframe.launch.supervise`."""
    _check(job, start_method)
    if job.function is None:
        start_method = "fork" if forks(job, start_method) else None
    output, numa = _output_and_numa(job)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_debug_terminal(job))
        stack.enter_context(output.line_buffered())
        root = stack.enter_context(temporary_folder())
        stack.enter_context(variables_of_ranks(job, {rank_script.ERROR_FILE: os.path.join(root, "start.json")}))
        silence = stack.enter_context(silence_torch())
        result, error = _Supervision(job, start_method, root, output, numa, silence.close).run()
    if error is not None:
        raise error  # raised here, because the frames above keep the store and its port alive
    return result


def _check(job: Job, start_method: str | None) -> None:
    if bool(job.command) == (job.function is not None):
        raise UsageError("A job is either a script (command=) or a function (function=).")
    if job.function is not None and start_method is None:
        raise UsageError("supervise() starts a function with multiprocessing: pass start_method=.")
    if job.command and job.command[0] != "-m" and not os.path.exists(job.command[0]):
        raise UsageError(f"No script {job.command[0]!r} in {os.getcwd()}.")
    if job.num_processes < 1:
        raise UsageError(f"num_processes={job.num_processes}: must be at least 1.")
    if (job.num_nodes > 1 or job.min_nodes) and (job.main_address is None or job.main_port is None):
        raise UsageError(f"num_nodes={job.num_nodes} needs node 0's address: pass --main-address and --main-port.")
    if job.min_nodes is not None and not 1 <= job.min_nodes <= job.num_nodes:
        raise UsageError(f"min_nodes={job.min_nodes}: must be 1 to num_nodes={job.num_nodes}.")
    if not 0 <= job.node_rank < job.num_nodes:
        raise UsageError(f"node_rank={job.node_rank}: must be 0 to {job.num_nodes - 1}.")


def _output_and_numa(job: Job) -> tuple[Output, Any]:
    """Return the routing of the ranks' output and torch's NUMA options; raise if one is not supported."""
    output, numa = Output.from_job(job), None
    if job.function is not None and sys.platform != "linux" and (job.log_dir is not None or job.tee):
        raise UnsupportedError("--log-dir and --tee require a script here: torch redirects functions on Linux only.")
    if job.numa_binding is not None:
        from plugframe.launch.numa import numa_options

        numa = numa_options(job.numa_binding, job.num_processes)
    output.check()
    return output, numa


def _debug_terminal(job: Job) -> contextlib.AbstractContextManager[None]:
    """Return a context manager for the terminal while a rank is debugged."""
    if job.debug_rank is None:
        return contextlib.nullcontext()
    from plugframe.launch import debug

    debug.check_rank(job)
    return debug.terminal(job)


class _Supervision:
    """Supervise a job's ranks on this node, restarts included."""

    def __init__(
        self,
        job: Job,
        start_method: str | None,
        root: str,
        output: Output,
        numa: Any,
        unsilence: Callable[[], None],
    ) -> None:
        self.job = job
        self._unsilence = unsilence
        #: Whether the ranks are processes of multiprocessing: those of a function, and forked ones of a script.
        self._multiprocessing = job.function is not None or start_method == "fork"
        one_node = job.num_nodes == 1 and job.min_nodes is None
        self.files = RankFiles(root, self._on_attempt, output, one_node=one_node)
        self.orphan_reaper = OrphanReaper(root)
        self.signals = Signals(
            on_second=lambda: self.monitor.kill_all(),
            on_warning=self._warn_ranks,
            on_interrupt=self._interrupt_debugger,
        )
        self._numa = numa
        self.handler = self._rendezvous()
        self.agent = self._agent(start_method)
        self.survivors = Survivors()
        self.monitor = RankMonitor(
            ranks=self._ranks,
            received=lambda: self.signals.received,
            resend_signal=self.signals.resend,
            done=self.files.done,
            error_file=self.files.error_file,
            stop_requested=lambda: self.handler.stop_requested,
            on_success=self.survivors.kill_copies if self._multiprocessing else lambda rank: None,
            grace_s=job.grace_s,
        )
        self._last_ranks: list[Rank] = []
        self._beats = self._vanished_checks = self._restarts = 0
        self._failure_key: tuple[Any, ...] | None = None
        self._oom_kills = out_of_memory_kills()

    def run(self) -> tuple[Any, Exception | None]:
        """Return the function's result on rank 0, and the error to raise."""
        try:
            with self.orphan_reaper, self.signals:
                return self._run()
        finally:
            # The agent holds the store and its port, and this object is in a reference cycle.
            del self.agent

    def _run(self) -> tuple[Any, Exception | None]:
        try:
            if not self._multiprocessing:
                self.monitor.start()
            result: Any = self.agent.run()
            self.signals.check()
            return self._outcome(result)
        except SignalException as error:
            self.monitor.kill_all()
            signum = error.sigval
            return None, RankFailedError(f"{signum.name}: all ranks were stopped.", exit_code=128 + signum)
        except ElsewhereError as error:
            self.monitor.kill_all()
            return None, self._remote_failure(str(error))
        except _HopelessError as error:
            self.monitor.kill_all()
            return None, self._failure(error.found)
        except _EndedError:
            return self._success({})
        except _VanishedError as error:
            self.monitor.kill_all()
            return None, RankFailedError(str(error), exit_code=1)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            if self._numa is None or self._last_ranks or isinstance(error, PlugframeError):
                raise
            from plugframe.launch.numa import binding_error

            return None, binding_error(str(self.job.numa_binding), error)
        finally:
            self.monitor.end()
            self.handler.shutdown()

    def _rendezvous(self) -> LoopbackRendezvous:
        job = self.job
        if job.num_nodes == 1 and job.min_nodes is None:
            return LoopbackRendezvous(self._on_beat)
        assert job.main_address is not None
        assert job.main_port is not None
        if job.min_nodes is not None:
            return ElasticRendezvous(
                self._on_beat,
                address=job.main_address,
                port=job.main_port,
                min_nodes=job.min_nodes,
                max_nodes=job.num_nodes,
                timeout_s=job.timeout_s,
            )
        return NodeRendezvous(
            self._on_beat,
            address=job.main_address,
            port=job.main_port,
            num_nodes=job.num_nodes,
            node_rank=job.node_rank,
            timeout_s=job.timeout_s,
        )

    def _agent(self, start_method: str | None) -> LocalElasticAgent:
        job = self.job
        entrypoint: Any = run_function
        args: tuple[Any, ...] = (os.getpid(), job.function, job.args)
        if job.function is None and start_method == "fork":
            entrypoint, args = make_entry_point(job.command, self._unsilence), (os.getpid(),)
        elif job.function is None:
            entrypoint = sys.executable
            script = os.path.abspath(rank_script.__file__)
            arguments = (*job.interpreter_options, script, str(os.getpid()), *job.command)
            args = tuple(word.replace("$", "$$") for word in arguments)  # torch fills in ${local_rank}
        spec = WorkerSpec(
            role="default",
            local_world_size=job.num_processes,
            entrypoint=entrypoint,
            args=args,
            rdzv_handler=self.handler,
            max_restarts=job.max_restarts,
            monitor_interval=_MONITOR_S,
            **({} if self._numa is None else {"numa_options": self._numa}),
        )
        options: dict[str, Any] = {"log_line_prefix_template": PREFIX}
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:  # not in every torch
            options["shutdown_timeout"] = math.ceil(job.grace_s)
        return LocalElasticAgent(spec, self.files, start_method=start_method or "", **options)

    def _ranks(self) -> list[Rank]:
        """Return the processes of the current attempt; empty while they are being started."""
        workers = self.agent.get_worker_group().workers
        ranks = [Rank(worker.id, worker.global_rank, worker.local_rank) for worker in workers if worker.id]
        if ranks:
            self._last_ranks = ranks
        return ranks

    def _warn_ranks(self) -> None:
        """Forward a scheduler's warning to the ranks, which may save and exit."""
        for rank in self._ranks():
            if is_child(rank.pid):
                os.kill(rank.pid, WARNING)

    def _interrupt_debugger(self) -> bool:
        """Forward Ctrl-C to the rank under the debugger; return whether that rank is on this node."""
        for rank in self._ranks():
            if rank.global_rank == self.job.debug_rank and is_child(rank.pid):
                os.kill(rank.pid, signal.SIGINT)
                return True
        return False

    def _on_beat(self) -> None:
        self.monitor.beat()
        self.orphan_reaper.set_groups([rank.pid for rank in self._ranks()])
        self._beats += 1
        if self._multiprocessing and self._beats % _VANISHED_BEATS == 0:
            self._check_vanished()

    def _check_vanished(self) -> None:
        """Raise if ranks exited with code 0 before the function returned: torch would wait forever."""
        waiting = [rank for rank in self._ranks() if not self.files.done(rank.local_rank)]
        gone = [rank for rank in waiting if not is_child(rank.pid)]
        self._vanished_checks = self._vanished_checks + 1 if gone and len(gone) == len(waiting) else 0
        if self._vanished_checks == _VANISHED_CHECKS:
            if self.job.command:
                raise _EndedError
            raise _VanishedError(
                f"rank {gone[0].global_rank} on {socket.gethostname()} exited before the function returned"
            )

    def _on_attempt(self, attempt: int) -> None:
        """Print why the ranks are restarted."""
        exits = self._rank_exits(None)
        culprit = find_culprit(exits)
        if culprit is not None:
            self._stop_if_repeated(culprit, exits)
        self._last_ranks = []
        cause = f"rank {culprit.rank} failed ({summary(culprit)})" if culprit else "a rank failed"
        action = f"restart {self._restarts + 1} of {self.job.max_restarts}"
        if self.handler.stop_requested and self.job.min_nodes is not None:
            cause, action = "the set of nodes changed", "restarting all ranks"  # not one of `max_restarts`
        else:
            self._restarts += 1
            cause = "another node restarted" if self.handler.stop_requested else cause
        self.handler.stop_requested = False
        print(f"{cause}; {action}", file=sys.stderr, flush=True)

    def _stop_if_repeated(self, culprit: RankExit, exits: list[RankExit]) -> None:
        before, self._failure_key = self._failure_key, failure_key(culprit)
        if self._failure_key is not None and self._failure_key == before:
            found = report(exits, host=socket.gethostname())
            step = f"after step {self._failure_key[-1]}" if self._failure_key[-1] else "before the first step"
            reason = f"not restarted: rank {culprit.rank} failed with the same error {step} as in the previous attempt"
            raise _HopelessError(replace(found, text=f"{found.text}\n{reason}"))

    def _rank_exits(self, result: RunResult | None) -> list[RankExit]:
        failures = result.failures if result is not None else {}
        exits = {}
        for rank in self._last_ranks or self._ranks_from_error_files():
            exited = self.monitor.exits.get(rank.pid)
            failure = failures.get(rank.global_rank)
            error = self.files.read_error(rank.local_rank)
            if error is not None:
                self.files.save_traceback(rank.global_rank, error)
            exits[rank.global_rank] = RankExit(
                rank=rank.global_rank,
                exit_code=failure.exitcode if failure is not None else exited.exit_code if exited is not None else None,
                time=error["time"] if error is not None else exited.time if exited is not None else None,
                error=error,
                crash_stack=self.files.crash_stack(rank.local_rank),
                killed_by_launcher=rank.pid in self.monitor.killed,
            )
        noticed = [number for number in failures if number in exits]
        return [exits.pop(number) for number in noticed] + list(exits.values())

    def _ranks_from_error_files(self) -> list[Rank]:
        """Return ranks that failed before torch reported their process ids, from their error files."""
        errors = {number: self.files.read_error(number) for number in range(self.job.num_processes)}
        return [Rank(data["pid"], data["rank"], number) for number, data in errors.items() if data is not None]

    def _outcome(self, result: RunResult) -> tuple[Any, Exception | None]:
        if not result.is_failed():
            return self._success(result.return_values)
        self._ranks()
        self.monitor.kill_all()
        if read_error_file(self.files.start_file) is not None:
            return None, OrderError(UNGUARDED)
        debugged = result.failures.get(-1 if self.job.debug_rank is None else self.job.debug_rank)
        if debugged is not None and debugged.exitcode == rank_script.INTERRUPTED:
            text = f"rank {self.job.debug_rank} quit the debugger: all ranks were stopped."
            found = Report(text=text, exit_code=rank_script.INTERRUPTED, certain=True, time=time.time())
            return None, self._failure(found)
        oom = out_of_memory_kills() > self._oom_kills
        return None, self._failure(report(self._rank_exits(result), host=socket.gethostname(), out_of_memory=oom))

    def _success(self, return_values: Mapping[int, Any]) -> tuple[Any, Exception | None]:
        if self.handler.stop_requested:  # while this node waited for the others to finish
            return None, self._remote_failure("")
        self.handler.leave()
        self._ranks()
        self.survivors.report(self._last_ranks)
        if self.signals.warned:
            text = f"{WARNING.name}: all ranks exited."
            return None, RankFailedError(text, exit_code=128 + WARNING)
        payload = return_values.get(0)
        return pickle.loads(payload) if payload is not None else None, None

    def _failure(self, here: Report) -> RankFailedError:
        """Return the error for a failure of this node, or of another node if that one is the cause."""
        hint = "" if self.files.log_folder is None else f"\noutput of the ranks: {self.files.log_folder}"
        if here.others_failed and self.files.log_folder is None and self.job.command:
            hint = "\ntracebacks of the other ranks: run again with --log-dir=DIR"
        mine = {"text": here.text + hint, "exit_code": here.exit_code, "certain": here.certain, "time": here.time}
        failures = self.handler.share_failure(mine)
        cause = min(failures, key=lambda other: (not other["certain"], other["time"]))
        text = cause["text"]
        if cause != mine:
            text += f"\nnode {self.job.node_rank}: stopped by the launcher"
        return RankFailedError(text, exit_code=cause["exit_code"])

    def _remote_failure(self, text: str) -> RankFailedError:
        """Return the error for a failure of another node: `text`, or the one that node has published."""
        found = Report(text=text or "A rank of another node failed.", exit_code=1, certain=bool(text), time=time.time())
        return self._failure(found)


class _HopelessError(Exception):
    """Raised if the ranks failed with the same error as in the previous attempt."""

    def __init__(self, found: Report) -> None:
        super().__init__(found.text)
        self.found = found


class _VanishedError(Exception):
    """Raised if a rank exited with code 0 before its function returned."""


class _EndedError(Exception):
    """Raised if all ranks of a script have succeeded, and some left by ``os._exit(0)``, for which torch would wait."""
