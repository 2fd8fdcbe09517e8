"""The contract of a launcher: who starts the ranks and watches over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plugframe.hooks.markers import provider


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be started.

    Attributes:
        num_processes: ranks on this node.
        num_nodes: nodes of the job, at most where `min_nodes` is given.
        min_nodes: the fewest nodes the job runs on; None if their number is fixed. Where it is given the nodes are
            numbered as they come, and all ranks start again when one comes or goes.
        node_rank: this node's rank.
        main_address: host name or address of node 0, or of the node at which all meet; None on one node.
        main_port: port there; None on one node, where a free one is taken.
        max_restarts: how often a failed group of ranks is started again.
        environ: variables the ranks get on top of this process's environment.
        command: arguments after the Python executable, for a script: ``("train.py", "--epochs", "3")`` or
            ``("-m", "pkg.train")``. Empty when a function is to be run.
        interpreter_options: options for the Python interpreter itself, such as ``("-X", "dev")``.
        function: for a function, a picklable callable that is called with `args` on every rank.
        args: its positional arguments.
        timeout_s: how long to wait for the other nodes.
        grace_s: how long ranks may go on after a signal to the launcher (but Ctrl-C), to save and leave.
        log_dir: a folder for files that keep what each rank says; None if they are not wanted.
        tee: which of a rank's streams, ``"stdout"`` and ``"stderr"``, the terminal shows with the rank before each
            line: of all ranks alike, or by global rank. None: both where there is a `log_dir`, else neither. What is
            not shown so goes to the files alone, and without a `log_dir` to the terminal as it is.
        numa_binding: how to bind ranks to the CPUs near their devices, in torchrun's words: ``"node"``.
        debug_rank: global rank of a script that runs under a debugger and gets the terminal; None for none.

    A launcher that cannot do what one of the last four asks for raises an `UnsupportedError`.
    """

    num_processes: int
    num_nodes: int = 1
    min_nodes: int | None = None
    node_rank: int = 0
    main_address: str | None = None
    main_port: int | None = None
    max_restarts: int = 0
    environ: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    interpreter_options: Sequence[str] = ()
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    timeout_s: float = 300.0
    grace_s: float = 30.0
    log_dir: str | None = None
    tee: Mapping[int, Sequence[str]] | Sequence[str] | None = None
    numa_binding: str | None = None
    debug_rank: int | None = None


class LauncherSpec(Protocol):
    """Hooks of the kind ``launcher``.

    A descriptor says what it can start: ``provides=("script",)``, ``("function",)`` or both, and
    ``"interactive"`` if a function typed at a prompt or in a notebook cell will do; ``"nodes"`` if one call starts the
    ranks of every node, which meet where it says: then nobody has to be told an address.
    """

    @provider
    def launcher_launch(self, job: Job) -> Any:
        """Start the ranks, wait until all have ended, and return what the function returned on rank 0.

        Called in the supervising process only. A script has no result: None.

        Raises:
            RankFailedError: if a rank failed; its report names rank, host and cause and holds the traceback.
            UsageError: if the job cannot be started this way (an unpicklable function, an address that
                does not answer).
        """
        ...
