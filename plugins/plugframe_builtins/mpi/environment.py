"""The environment of mpirun."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

from plugframe.base import Environment
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World


@dataclass(frozen=True)
class Family:
    """The environment variables and options of one family of MPI implementations."""

    rank: str
    size: str
    local_rank: str
    local_size: str
    export: str
    processes_hint: str
    packed_hint: str

    @property
    def started(self) -> bool:
        """Whether a launcher of this family started this process."""
        return all(v in os.environ for v in (self.rank, self.size, self.local_rank, self.local_size))


OPEN_MPI = Family(
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    local_size="OMPI_COMM_WORLD_LOCAL_SIZE",
    export="-x {}=",
    processes_hint="mpirun --map-by ppr:{n}:node",
    packed_hint="type 'mpirun --rank-by slot'",
)
#: MPICH and Intel MPI. srun does not set the last two, but sets the first two for programs linked to PMI.
HYDRA = Family(
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank="MPI_LOCALRANKID",
    local_size="MPI_LOCALNRANKS",
    export="-genv {} ",
    processes_hint="mpirun -ppn {n}",
    packed_hint="type 'mpirun -ppn' with the processes of a node",
)
#: Variables that differ between two mpiruns and are equal on all ranks of one, by preference.
IDENTITIES = ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri", "OMPI_MCA_ess_base_jobid", "I_MPI_HYDRA_UUID")


class MPI(Environment):
    """Ranks of mpirun. MPI itself is not used: ranks connect through torch.distributed.

    On one node they connect on loopback, on a port derived from the mpirun's id; ``MASTER_PORT``
    overrides it. On several nodes no variable names the host of rank 0, so ``MASTER_ADDR`` and ``MASTER_PORT`` must
    be passed to all ranks.
    """

    name = "MPI"

    def __init__(self) -> None:
        self._family = HYDRA if HYDRA.started and not OPEN_MPI.started else OPEN_MPI
        self.processes_hint = self._family.processes_hint
        self.packed_hint = self._family.packed_hint

    @hookimpl
    def environment_detect(self) -> bool:
        # srun with its PMIx plugin sets Open MPI's variables too; then SLURM has more information.
        by_srun = os.environ.get("PMIX_NAMESPACE", "").startswith("slurm.pmix.")
        return (OPEN_MPI.started and not by_srun) or HYDRA.started

    @hookimpl
    def environment_world(self) -> World:
        family = self._family
        return self.packed_world(
            rank=family.rank, size=family.size, local_rank=family.local_rank, local_size=family.local_size
        )

    def main(self) -> tuple[str, int]:
        address = os.environ.get("MASTER_ADDR")
        if self.environment_world().num_nodes == 1:
            return "127.0.0.1", self.main_port(0 if os.environ.get("MASTER_PORT") else self._job())
        if not address or not os.environ.get("MASTER_PORT"):
            export = self._family.export
            raise EnvironmentMismatchError(
                f"MASTER_ADDR={address or ''} and MASTER_PORT={os.environ.get('MASTER_PORT', '')} must both be set "
                "for MPI on several nodes: type "
                f"'mpirun {export.format('MASTER_ADDR')}<host of rank 0> {export.format('MASTER_PORT')}29500 …'."
            )
        return address, self.main_port(0)

    def _job(self) -> int:
        for variable in IDENTITIES:
            if os.environ.get(variable):
                return zlib.crc32(os.environ[variable].encode())
        # MPICH sets no job id, but starts each rank as a session leader: their parent is the same.
        if os.getsid(0) == os.getpid():
            return os.getppid()
        raise EnvironmentMismatchError(
            "Nothing in the variables of this mpirun gives a port for its ranks: type "
            f"'mpirun {self._family.export.format('MASTER_PORT')}29500 …' with a port that is free."
        )
