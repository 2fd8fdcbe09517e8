"""The launcher contract: start and supervise the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from plugframe.hooks.markers import provider


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job to launch.

    Attributes:
        num_processes: ranks on this node.
        num_nodes: nodes of the job, at most where `min_nodes` is given.
        min_nodes: the minimum number of nodes; None if their number is fixed. If given, nodes are numbered in the
            order they join, and all ranks restart when one joins or leaves.
        node_rank: this node's rank.
        main_address: host name or address of node 0, or of the rendezvous node; None on one node.
        main_port: port there; None on one node, where a free one is chosen.
        max_restarts: how often a failed group of ranks is restarted.
        environ: variables that the ranks get in addition to this process's environment.
        command: arguments after the Python executable, for a script: ``("train.py", "--epochs", "3")`` or
            ``("-m", "pkg.train")``. Empty for a function.
        forkable: for a script, whether its ranks may be forked from this process: it runs nothing of the user's, and
            the accelerator works in copies of a process that has imported torch.
        interpreter_options: options for the Python interpreter itself, such as ``("-X", "dev")``.
        function: for a function, a picklable callable that is called with `args` on every rank.
        args: its positional arguments.
        timeout_s: how long to wait for the other nodes.
        grace_s: seconds the ranks have to save and exit after a signal to the launcher other than Ctrl-C.
        log_dir: a folder for one log file per rank and stream; None writes no files.
        tee: the streams, ``"stdout"`` and ``"stderr"``, to show on the terminal prefixed with the rank: for all ranks,
            or by global rank. None: both if there is a `log_dir`, else neither. Other streams go to the files only, or
            without a `log_dir` to the terminal unprefixed.
        numa_binding: how to bind ranks to the CPUs near their devices, with torchrun's values: ``"node"``.
        debug_rank: global rank of a script that runs under a debugger with the terminal as input; None for none.

    A launcher that does not support one of the last four raises an `UnsupportedError`.
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
    forkable: bool = False
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

    The descriptor lists what it can launch: ``provides=("script",)``, ``("function",)`` or both, and
    ``"interactive"`` if it can launch a function defined at a prompt or in a notebook cell; ``"nodes"`` if one call
    starts the ranks of every node and provides the rendezvous, so that no address is needed.
    """

    @provider
    def launcher_launch(self, job: Job) -> Any:
        """Start the ranks, wait until all have ended, and return the function's result on rank 0, None for a script.

        Called in the supervising process only.

        Raises:
            RankFailedError: if a rank failed; its report names rank, host and cause and holds the traceback.
            UsageError: if the job cannot be launched this way (an unpicklable function, an unreachable address).
        """
        ...
