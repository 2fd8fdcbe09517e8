"""Start the script of a plan: replace this process by it, or start ranks with a launcher."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from plugframe.cli import supervision_options
from plugframe.core.config.request import Request, variable
from plugframe.core.planning.plan import Choice, Plan
from plugframe.core.registry.catalogue import Catalogue
from plugframe.errors import PlugframeWarning, SettingError
from plugframe.hooks.launcher import Job
from plugframe.hooks.variables import FROM_COMMAND_LINE
from plugframe.launch.choose import choose_launcher

#: The default port of node 0, as in PyTorch's own launcher.
MAIN_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The options for nodes and supervision from the command line; None where not given."""

    node_rank: int | None = None
    main_address: str | None = None
    main_port: int | None = None
    max_restarts: int | None = None
    rdzv_endpoint: str | None = None
    rdzv_timeout_s: float | None = None
    min_nodes: int | None = None
    grace_s: float | None = None
    log_dir: str | None = None
    tee: str | None = None
    numa_binding: str | None = None
    debug_rank: int | None = None

    def given(self) -> list[str]:
        """Return the names of the given options."""
        names = {"grace_s": "grace-period", "rdzv_timeout_s": "rdzv-timeout"}
        found = [name for name, value in vars(self).items() if name != "min_nodes" and value is not None]
        return [f"--{names.get(name, name.replace('_', '-'))}" for name in found]

    @property
    def says_where(self) -> bool:
        """Whether an option names this node or the rendezvous, so that the ranks are still to be started."""
        return any(
            value is not None for value in (self.node_rank, self.main_address, self.main_port, self.rdzv_endpoint)
        )


@dataclass(frozen=True, kw_only=True)
class Start:
    """A prepared start of a script.

    Attributes:
        command: arguments after the Python executable.
        variables: environment variables passed to the script.
        why: the reason why no launcher is needed; empty if one is.
        launcher: the launcher of the ranks; None if this process becomes the script.
        job: the job passed to the launcher.
    """

    command: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    why: str = ""
    launcher: Choice | None = None
    job: Job | None = None

    def lines(self) -> list[str]:
        """Return a description for ``--dry-run``."""
        if self.job is None or self.launcher is None:
            what = f"this process becomes {shlex.join(['python', '-u', *self.command])} ({self.why})"
        else:
            job = self.job
            ranks = f"{job.num_processes} rank{'s' if job.num_processes > 1 else ''}"
            node = f", node {job.node_rank} of {job.num_nodes}, main {job.main_address}:{job.main_port}"
            if job.min_nodes is not None:
                node = f" on {job.min_nodes} to {job.num_nodes} nodes, rendezvous at {job.main_address}:{job.main_port}"
            restarts = f", up to {job.max_restarts} restarts" if job.max_restarts else ""
            restarts += f", output saved in {job.log_dir}" if job.log_dir is not None else ""
            restarts += f", bound to the CPUs by {job.numa_binding}" if job.numa_binding is not None else ""
            restarts += f", rank {job.debug_rank} under pdb" if job.debug_rank is not None else ""
            what = (
                f"{ranks} of {shlex.join(['python', *self.command])} by launcher {self.launcher.origin}"
                f"{node if job.main_address else ''}{restarts}"
            )
        shown = {name: text for name, text in self.variables.items() if text and name != FROM_COMMAND_LINE}
        return [f"starts: {what}", *(f"hands over: {name}={shlex.quote(text)}" for name, text in shown.items())]

    def go(self, catalogue: Catalogue) -> None:
        """Start the script, and return once all ranks have succeeded.

        Raises:
            RankFailedError: if a rank failed.
        """
        if self.job is None or self.launcher is None:
            _become(self.command, self.variables)
        self.launcher.make(catalogue).launcher_launch(job=self.job)


def decide(
    plan: Plan,
    request: Request,
    catalogue: Catalogue,
    *,
    command: Sequence[str],
    variables: Mapping[str, str],
    nodes: Nodes,
) -> Start:
    """Return the start for `plan`.

    Raises:
        UsageError: if the options for nodes are incomplete, or no launcher supports them.
    """
    if plan.launched:
        who = plan.choices["environment"].name
        _no_effect([*nodes.given(), *_launcher_options(request)], f"{who} has started the processes already")
        return Start(command=command, variables=variables, why=f"{who} has started the processes")
    several = plan.num_nodes > 1 or nodes.min_nodes is not None
    if not several:
        _check_single(nodes)
    if plan.world_size == 1 and nodes.min_nodes is None and not _supervision_asked(nodes, request):
        return Start(command=command, variables=variables, why="one rank needs no supervision")
    launcher = choose_launcher(request, catalogue, "script")
    if request.get("environment"):
        # The setting describes this process. The ranks are started by the launcher, and detect that.
        variables = {**variables, variable("environment"): "auto"}
    _check_seconds(nodes)
    node_rank, main_address, main_port = _rendezvous(plan, nodes, launcher, several=several)
    if nodes.debug_rank is not None:
        variables = supervision_options.patient(variables, request)
    job = Job(
        num_processes=len(plan.devices),
        num_nodes=plan.num_nodes,
        min_nodes=nodes.min_nodes,
        node_rank=node_rank,
        main_address=main_address,
        main_port=main_port,
        environ=variables,
        command=tuple(command),
        forkable="fork" in plan.choices["accelerator"].descriptor.provides,
        grace_s=Job.grace_s if nodes.grace_s is None else nodes.grace_s,
        timeout_s=Job.timeout_s if nodes.rdzv_timeout_s is None else nodes.rdzv_timeout_s,
        **supervision_options.fields(plan, nodes),
    )
    supervision_options.check(job)
    return Start(command=command, variables=variables, launcher=launcher, job=job)


def _supervision_asked(nodes: Nodes, request: Request) -> bool:
    """Return whether an option needs a launcher even for one rank."""
    given = (nodes.grace_s, nodes.log_dir, nodes.tee, nodes.numa_binding, nodes.debug_rank, request.get("launcher"))
    return bool(nodes.max_restarts or any(value is not None for value in given) or _launcher_options(request))


def _check_seconds(nodes: Nodes) -> None:
    if nodes.rdzv_timeout_s is not None and not 0 < nodes.rdzv_timeout_s < float("inf"):
        raise SettingError(f"--rdzv-timeout={nodes.rdzv_timeout_s:g}: must be a number of seconds above 0.")
    if nodes.grace_s is not None and not 0 <= nodes.grace_s < float("inf"):
        raise SettingError(f"--grace-period={nodes.grace_s:g}: must be a number of seconds from 0.")


def _rendezvous(plan: Plan, nodes: Nodes, launcher: Choice, *, several: bool) -> tuple[int, str | None, int | None]:
    """Return rank of this node, address and port at which the launchers of several nodes connect."""
    if nodes.min_nodes is not None:
        return 0, *_endpoint(nodes)
    if "nodes" in launcher.descriptor.provides:
        if nodes.node_rank is not None:
            _no_effect(["--node-rank"], f"launcher {launcher.name!r} starts every node")
        return 0, nodes.main_address, nodes.main_port
    return _fixed_rendezvous(plan.num_nodes, nodes) if several else (0, None, None)


def _become(command: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Replace this process by the script, which then gets the terminal and signals directly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(sys.executable, [sys.executable, "-u", *command], {**os.environ, **variables})


def _no_effect(options: Sequence[str], why: str) -> None:
    if options:
        has = "has" if len(options) == 1 else "have"
        warnings.warn(f"{', '.join(options)} {has} no effect: {why}.", PlugframeWarning, stacklevel=3)


def _launcher_options(request: Request) -> list[str]:
    """Return the given options of the launcher."""
    return [each.spelled(each.name) for each in request.options if each.kind == "launcher" and each.by == "command"]


def _check_single(nodes: Nodes) -> None:
    if nodes.node_rank:
        raise SettingError(f"--node-rank={nodes.node_rank}, but there is one node: add --num-nodes, or remove it.")
    useless = [option for option in nodes.given() if option.startswith(("--main", "--rdzv"))]
    _no_effect(useless, "one node needs no address; for several add --num-nodes")


def _endpoint(nodes: Nodes) -> tuple[str, int]:
    """Return host and port of the rendezvous for an elastic number of nodes."""
    wrong = [option for option in nodes.given() if option in ("--node-rank", "--main-address", "--main-port")]
    if wrong:
        raise SettingError(
            f"{wrong[0]} is for a fixed number of nodes; with --num-nodes=MIN:MAX nodes are numbered as they join, at "
            "--rdzv-endpoint=HOST:PORT."
        )
    if nodes.rdzv_endpoint is None:
        raise SettingError(
            "--num-nodes=MIN:MAX needs a rendezvous, the same on every node: add --rdzv-endpoint=HOST:PORT, "
            "where HOST is a node that stays."
        )
    host, separator, port = nodes.rdzv_endpoint.rpartition(":")
    if not separator:
        return nodes.rdzv_endpoint, MAIN_PORT
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise SettingError(f"--rdzv-endpoint={nodes.rdzv_endpoint!r} is not HOST:PORT, such as node0:29500.")
    return host.strip("[]"), int(port)


def _fixed_rendezvous(num_nodes: int, nodes: Nodes) -> tuple[int, str, int]:
    """Return this node's rank, and host and port of node 0."""
    if nodes.rdzv_endpoint is not None:
        raise SettingError(
            f"--rdzv-endpoint is for a varying number of nodes: use --num-nodes={num_nodes}:{num_nodes}, "
            "or give --node-rank and --main-address."
        )
    address = nodes.main_address or os.environ.get("MASTER_ADDR")
    if not address:
        raise SettingError(
            f"num_nodes={num_nodes} needs the address of node 0, the same on every node: add --main-address=HOST."
        )
    node_rank = nodes.node_rank if nodes.node_rank is not None else _read_int("NODE_RANK", "--node-rank")
    if node_rank is None:
        raise SettingError(
            f"num_nodes={num_nodes} needs the rank of this node: add --node-rank=0 on {address}, "
            f"{'--node-rank=1 on the other' if num_nodes == 2 else f'1 to {num_nodes - 1} on the others'}."
        )
    if not 0 <= node_rank < num_nodes:
        raise SettingError(f"node_rank={node_rank}, but num_nodes={num_nodes}: must be 0 to {num_nodes - 1}.")
    return node_rank, address, nodes.main_port or _read_int("MASTER_PORT", "--main-port") or MAIN_PORT


def _read_int(name: str, option: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise SettingError(f"{name}={text!r} in the environment is not a number: fix it, or add {option}.") from None
