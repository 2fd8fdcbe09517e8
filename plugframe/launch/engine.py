"""Start the ranks with torch's elastic agent, wait, and make one report of what went wrong."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import pickle
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException

from plugframe.errors import OrderError, PlugframeError, RankFailedError, UnsupportedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import rank as rank_script
from plugframe.launch.elastic import Elastic
from plugframe.launch.files import RankFiles, read_words
from plugframe.launch.folder import temporary_folder
from plugframe.launch.function import UNGUARDED, run_function
from plugframe.launch.memory import out_of_memory_kills
from plugframe.launch.monitor import Rank, Watch, is_child
from plugframe.launch.nodes import ElsewhereError, Nodes
from plugframe.launch.orphan_reaper import Guardian
from plugframe.launch.output import PREFIX, Output
from plugframe.launch.rendezvous import Loopback
from plugframe.launch.report import Ending, Report, culprit_of, mark, report, summary
from plugframe.launch.signals import WARNING, Signals
from plugframe.launch.survivors import Survivors
from plugframe.launch.variables import variables_of_ranks

_MONITOR_S = 0.05
#: Beats between two looks for ranks that have vanished, and how many such looks are proof.
_VANISHED_BEATS, _VANISHED_LOOKS = 10, 3


def supervise(job: Job, *, start_method: str | None = None) -> Any:
    """See `plugframe.launch.supervise`."""
    _check(job, start_method)
    output, numa = _asked(job)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_for_debugging(job))
        stack.enter_context(output.flowing())
        root = stack.enter_context(temporary_folder())
        stack.enter_context(variables_of_ranks(job, {rank_script.ERROR_FILE: os.path.join(root, "start.json")}))
        stack.enter_context(_silence())
        result, error = _Supervision(job, start_method, root, output, numa).run()
    if error is not None:
        raise error  # here, where no frame keeps the store, and its port, alive
    return result


def _check(job: Job, start_method: str | None) -> None:
    if bool(job.command) == (job.function is not None):
        raise UsageError("A job is either a script (command=) or a function (function=).")
    if job.function is not None and start_method is None:
        raise UsageError("supervise() starts a function by multiprocessing: say how (start_method=).")
    if job.command and job.command[0] != "-m" and not os.path.exists(job.command[0]):
        raise UsageError(f"There is no script {job.command[0]!r} in {os.getcwd()}.")
    if job.num_processes < 1:
        raise UsageError(f"num_processes={job.num_processes}: a job has at least one process on each node.")
    if (job.num_nodes > 1 or job.min_nodes) and (job.main_address is None or job.main_port is None):
        raise UsageError(f"{job.num_nodes} nodes meet at node 0: say where (--main-address and --main-port).")
    if job.min_nodes is not None and not 1 <= job.min_nodes <= job.num_nodes:
        raise UsageError(f"min_nodes={job.min_nodes}: it is 1 to {job.num_nodes}, the most nodes of this job.")
    if not 0 <= job.node_rank < job.num_nodes:
        raise UsageError(f"node_rank={job.node_rank}: node ranks go from 0 to {job.num_nodes - 1} here.")


def _asked(job: Job) -> tuple[Output, Any]:
    """Return what becomes of the ranks' output and torch's options for NUMA; refuse what cannot be had."""
    output, numa = Output.of(job), None
    if job.function is not None and sys.platform != "linux" and (job.log_dir is not None or job.tee):
        raise UnsupportedError("--log-dir and --tee are for scripts here: torch redirects functions on Linux alone.")
    if job.numa_binding is not None:
        from plugframe.launch.numa import numa_options

        numa = numa_options(job.numa_binding, job.num_processes)
    output.check()
    return output, numa


def _for_debugging(job: Job) -> contextlib.AbstractContextManager[None]:
    """Return what the terminal needs while a rank is debugged."""
    if job.debug_rank is None:
        return contextlib.nullcontext()
    from plugframe.launch import debug

    debug.check_rank(job)
    return debug.terminal(job)


class _Supervision:
    """One run of a job's ranks on this node, restarts included."""

    def __init__(self, job: Job, start_method: str | None, root: str, output: Output, numa: Any) -> None:
        self.job = job
        one_node = job.num_nodes == 1 and job.min_nodes is None
        self.files = RankFiles(root, self._on_attempt, output, one_node=one_node)
        self.guardian = Guardian(root)
        self.signals = Signals(
            on_second=lambda: self.watch.kill_all(), on_warning=self._warn_ranks, on_interrupt=self._interrupt_debugger
        )
        self._numa = numa
        self.handler = self._rendezvous()
        self.agent = self._agent(start_method)
        self.survivors = Survivors()
        self.watch = Watch(
            ranks=self._ranks,
            received=lambda: self.signals.received,
            insist=self.signals.insist,
            done=self.files.done,
            error_file=self.files.error_file,
            recalled=lambda: self.handler.recalled,
            ended_well=self.survivors.end_copies if job.function is not None else lambda rank: None,
            grace_s=job.grace_s,
        )
        self._last_ranks: list[Rank] = []
        self._beats = self._looks = self._restarts = 0
        self._mark: tuple[Any, ...] | None = None
        self._oom_kills = out_of_memory_kills()

    def run(self) -> tuple[Any, Exception | None]:
        """Return what the function returned on rank 0, and the error to raise."""
        try:
            with self.guardian, self.signals:
                return self._run()
        finally:
            del self.agent  # and with it the store and its port: the rest of this object is a cycle, and stays a while

    def _run(self) -> tuple[Any, Exception | None]:
        try:
            if self.job.function is None:
                self.watch.start()
            result: Any = self.agent.run()
            self.signals.check()
            return self._outcome(result)
        except SignalException as error:
            self.watch.kill_all()
            signum = error.sigval
            return None, RankFailedError(f"{signum.name}: every rank has been ended.", exit_code=128 + signum)
        except ElsewhereError as error:
            self.watch.kill_all()
            return None, self._elsewhere(str(error))
        except _HopelessError as error:
            self.watch.kill_all()
            return None, self._told(error.found)
        except _VanishedError as error:
            self.watch.kill_all()
            return None, RankFailedError(str(error), exit_code=1)
        except (AssertionError, OSError, RuntimeError, ValueError) as error:
            if self._numa is None or self._last_ranks or isinstance(error, PlugframeError):
                raise
            from plugframe.launch.numa import refused

            return None, refused(str(self.job.numa_binding), error)
        finally:
            self.watch.end()
            self.handler.shutdown()

    def _rendezvous(self) -> Loopback:
        job = self.job
        if job.num_nodes == 1 and job.min_nodes is None:
            return Loopback(self._on_beat)
        assert job.main_address is not None
        assert job.main_port is not None
        if job.min_nodes is not None:
            return Elastic(
                self._on_beat,
                address=job.main_address,
                port=job.main_port,
                min_nodes=job.min_nodes,
                max_nodes=job.num_nodes,
                timeout_s=job.timeout_s,
            )
        return Nodes(
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
        if job.function is None:
            entrypoint = sys.executable
            script = os.path.abspath(rank_script.__file__)
            words = (*job.interpreter_options, script, str(os.getpid()), *job.command)
            args = tuple(word.replace("$", "$$") for word in words)  # torch fills in ${local_rank}
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
        """Return the processes of the current attempt, none while they are being started."""
        workers = self.agent.get_worker_group().workers
        ranks = [Rank(worker.id, worker.global_rank, worker.local_rank) for worker in workers if worker.id]
        if ranks:
            self._last_ranks = ranks
        return ranks

    def _warn_ranks(self) -> None:
        """Pass a scheduler's warning on to the ranks, which may save and leave."""
        for rank in self._ranks():
            if is_child(rank.pid):
                os.kill(rank.pid, WARNING)

    def _interrupt_debugger(self) -> bool:
        """Pass Ctrl-C on to the rank under the debugger, which it stops; say whether there is one here."""
        for rank in self._ranks():
            if rank.global_rank == self.job.debug_rank and is_child(rank.pid):
                os.kill(rank.pid, signal.SIGINT)
                return True
        return False

    def _on_beat(self) -> None:
        self.watch.beat()
        self.guardian.guard([rank.pid for rank in self._ranks()])
        self._beats += 1
        if self.job.function is not None and self._beats % _VANISHED_BEATS == 0:
            self._look_for_vanished()

    def _look_for_vanished(self) -> None:
        """Raise if ranks have left in the middle of the function with exit code 0: torch would wait for ever."""
        waiting = [rank for rank in self._ranks() if not self.files.done(rank.local_rank)]
        gone = [rank for rank in waiting if not is_child(rank.pid)]
        self._looks = self._looks + 1 if gone and len(gone) == len(waiting) else 0
        if self._looks == _VANISHED_LOOKS:
            raise _VanishedError(
                f"rank {gone[0].global_rank} on {socket.gethostname()} left before the function returned"
            )

    def _on_attempt(self, attempt: int) -> None:
        """Say why the ranks start again."""
        endings = self._endings(None)
        culprit = culprit_of(endings)
        if culprit is not None:
            self._give_up_if_the_same(culprit, endings)
        self._last_ranks = []
        what = f"rank {culprit.rank} failed ({summary(culprit)})" if culprit else "a rank failed"
        which = f"restart {self._restarts + 1} of {self.job.max_restarts}"
        if self.handler.recalled and self.job.min_nodes is not None:
            what, which = "a node comes, goes or starts again", "all ranks start again"  # not one of `max_restarts`
        else:
            self._restarts += 1
            what = "another node starts again" if self.handler.recalled else what
        self.handler.recalled = False
        print(f"{what}; {which}", file=sys.stderr, flush=True)

    def _give_up_if_the_same(self, culprit: Ending, endings: list[Ending]) -> None:
        before, self._mark = self._mark, mark(culprit)
        if self._mark is not None and self._mark == before:
            found = report(endings, host=socket.gethostname())
            step = f"after step {self._mark[-1]}" if self._mark[-1] else "before the first step"
            again = f"not started again: rank {culprit.rank} failed in the same way, {step}, as in the attempt before"
            raise _HopelessError(replace(found, text=f"{found.text}\n{again}"))

    def _endings(self, result: RunResult | None) -> list[Ending]:
        failures = result.failures if result is not None else {}
        endings = {}
        for rank in self._last_ranks or self._speakers():
            death = self.watch.deaths.get(rank.pid)
            failure = failures.get(rank.global_rank)
            words = self.files.words(rank.local_rank)
            if words is not None:
                self.files.keep_words(rank.global_rank, words)
            endings[rank.global_rank] = Ending(
                rank=rank.global_rank,
                exit_code=failure.exitcode if failure is not None else death.exit_code if death is not None else None,
                time=words["time"] if words is not None else death.time if death is not None else None,
                words=words,
                crash=self.files.crash(rank.local_rank),
                by_launcher=rank.pid in self.watch.killed,
            )
        noticed = [number for number in failures if number in endings]
        return [endings.pop(number) for number in noticed] + list(endings.values())

    def _speakers(self) -> list[Rank]:
        """Return the ranks that failed so early that nobody had seen them, from their last words."""
        words = {number: self.files.words(number) for number in range(self.job.num_processes)}
        return [Rank(said["pid"], said["rank"], number) for number, said in words.items() if said is not None]

    def _outcome(self, result: RunResult) -> tuple[Any, Exception | None]:
        if not result.is_failed():
            if self.handler.recalled:  # while this node waited for the others to end
                return None, self._elsewhere("")
            self.handler.part()
            self._ranks()
            self.survivors.tell(self._last_ranks)
            if self.signals.warned:
                text = f"{WARNING.name}: every rank has left."
                return None, RankFailedError(text, exit_code=128 + WARNING)
            payload = result.return_values.get(0)
            return pickle.loads(payload) if payload is not None else None, None
        self._ranks()
        self.watch.kill_all()
        if read_words(self.files.start_file) is not None:
            return None, OrderError(UNGUARDED)
        debugged = result.failures.get(-1 if self.job.debug_rank is None else self.job.debug_rank)
        if debugged is not None and debugged.exitcode == rank_script.INTERRUPTED:
            text = f"rank {self.job.debug_rank} has left the debugger: every rank has been ended."
            found = Report(text=text, exit_code=rank_script.INTERRUPTED, certain=True, time=time.time())
            return None, self._told(found)
        oom = out_of_memory_kills() > self._oom_kills
        return None, self._told(report(self._endings(result), host=socket.gethostname(), out_of_memory=oom))

    def _told(self, here: Report) -> RankFailedError:
        """Return the error for a failure here, or on another node if that one was the cause."""
        kept = "" if self.files.kept is None else f"\nwhat the ranks said: {self.files.kept}"
        if here.others_failed and self.files.kept is None and self.job.command:
            kept = "\nthe tracebacks of the others: plugframe run --log-dir=DIR keeps them"
        mine = {"text": here.text + kept, "exit_code": here.exit_code, "certain": here.certain, "time": here.time}
        told = self.handler.tell_failure(mine)
        cause = min(told, key=lambda other: (not other["certain"], other["time"]))
        text = cause["text"] if cause == mine else f"{cause['text']}\nnode {self.job.node_rank}: ended by the launcher"
        return RankFailedError(text, exit_code=cause["exit_code"])

    def _elsewhere(self, text: str) -> RankFailedError:
        """Return the error for a failure of another node: `text`, or what that one tells."""
        found = Report(text=text or "A rank of another node failed.", exit_code=1, certain=bool(text), time=time.time())
        return self._told(found)


class _HopelessError(Exception):
    """The ranks failed as they did in the attempt before."""

    def __init__(self, found: Report) -> None:
        super().__init__(found.text)
        self.found = found


class _VanishedError(Exception):
    """A rank left with exit code 0 before its function returned."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch's own account of a failure from the terminal: ours says it once."""
    names = ("torch.distributed.elastic", "torch.multiprocessing", "torch.numa")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.propagate for logger in loggers]
    handler = logging.NullHandler()
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with warnings.catch_warnings():
            # Python's, when it forks beside the store's thread, which the ranks have no use for.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            # Torch leaves it to the collector to close the files of a rank that has ended.
            warnings.filterwarnings("ignore", message=r"unclosed file .*\.log'", category=ResourceWarning)
            yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
