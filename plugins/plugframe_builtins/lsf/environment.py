"""The environment of jsrun."""

from __future__ import annotations

import os
from pathlib import Path

from plugframe.base import Environment
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World
from plugframe_builtins.lsf import plugin


class LSF(Environment):
    """The tasks of one jsrun.

    They connect to the first host of the job that jsrun uses, on a port derived from the job id;
    ``MASTER_ADDR`` and ``MASTER_PORT`` override them.
    """

    name = "LSF"
    processes_hint = "jsrun --tasks_per_rs={n} --rs_per_host=1"
    nodes_hint = "jsrun --nrs={n} --rs_per_host=1"
    packed_hint = "type 'jsrun --launch_distribution packed'"

    @hookimpl
    def environment_detect(self) -> bool:
        return all(variable in os.environ for variable in plugin.variables)

    @hookimpl
    def environment_world(self) -> World:
        return self.packed_world(
            rank="JSM_NAMESPACE_RANK",
            size="JSM_NAMESPACE_SIZE",
            local_rank="JSM_NAMESPACE_LOCAL_RANK",
            local_size="JSM_NAMESPACE_LOCAL_SIZE",
        )

    def main(self) -> tuple[str, int]:
        num_nodes = self.environment_world().num_nodes
        port = self.main_port(self.read_int("LSB_JOBID"))
        if num_nodes == 1:
            return "127.0.0.1", port
        address = os.environ.get("MASTER_ADDR")
        if address:
            return address, port
        hosts = _hosts()
        if len(hosts) < num_nodes:
            raise EnvironmentMismatchError(
                f"jsrun runs on {num_nodes} hosts, LSB_MCPU_HOSTS and LSB_DJOB_RANKFILE name {len(hosts)}: set "
                "MASTER_ADDR to the host of rank 0."
            )
        # The first host runs the job script, if there are more hosts than jsrun uses.
        return hosts[1 if len(hosts) > num_nodes else 0], port


def _hosts() -> list[str]:
    """Return each host of the job once, in LSF's order."""
    rankfile = os.environ.get("LSB_DJOB_RANKFILE")
    if os.environ.get("LSB_MCPU_HOSTS"):
        words = os.environ["LSB_MCPU_HOSTS"].split()[::2]  # alternating host and slots
    elif rankfile and Path(rankfile).is_file():
        words = Path(rankfile).read_text(encoding="utf-8").split()
    else:
        words = []
    return list(dict.fromkeys(words))
