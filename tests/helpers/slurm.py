"""A SLURM of its own on this machine: a login host and nodes, which are namespaces, each with a slurmd.

Usage: slurm.py COMMAND ARGUMENT ..., run on the login host, as in: slurm.py srun --nodes=2 hostname
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hosts import Hosts, hosts, why_not

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "munged", "unshare")
#: Cleanly apart from this machine: what a host starts ends with it, it has a name, and it knows the others'.
ENTER = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
NAMED = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && "$@"'
CONFIGURATION = """\
ClusterName=plugframe
SlurmctldHost=login({login})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
ReturnToService=2
MailProg=/bin/true
KillWait=10
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why there can be no SLURM here, an empty string if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm)" if absent else why_not()


class Slurm:
    """Nodes node1, node2, … of 4 processors each, and the host login, on which commands run."""

    def __init__(self, folder: Path, made: Hosts) -> None:
        self.nodes = [f"node{number}" for number in range(1, made.number)]
        self._folder, self._hosts = folder, made

    def start(self, *command: str, cwd: Path, log: Path) -> subprocess.Popen[str]:
        """Start a command on the login host; its output goes to a file."""
        return self._start(0, command, cwd=cwd, log=log)

    def run(self, *command: str, cwd: Path, timeout_s: float = 120.0) -> tuple[int, str]:
        """Run a command on the login host; return its exit code and its output."""
        with tempfile.NamedTemporaryFile("r", dir=self._folder, suffix=".out") as file:
            process = self.start(*command, cwd=cwd, log=Path(file.name))
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"{' '.join(command)} did not end:\n{file.read()}\n{self.logs()}") from None
            return code, file.read()

    def logs(self) -> str:
        """Return what the daemons have told."""
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(self._folder.glob("*.log")))

    def _begin(self) -> None:
        folder = self._folder
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        names = ["login", *self.nodes]
        addresses = [self._hosts.address(number) for number in range(len(names))]
        lines = [f"{address} {name}\n" for address, name in zip(addresses, names, strict=True)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        described = (
            f"NodeName={name} NodeAddr={address} CPUs=4 State=UNKNOWN"
            for name, address in zip(self.nodes, addresses[1:], strict=True)
        )
        text = CONFIGURATION.format(folder=folder, login=addresses[0], nodes="\n".join(described))
        (folder / "slurm.conf").write_text(text)
        # None is used. Finding out by itself which kind there is would fail: a host sees no mounted one.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self._daemon(0, "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self._wait(lambda: (folder / "munge.socket").exists())
        self._daemon(0, "slurmctld", "-D")
        for number, node in enumerate(self.nodes, start=1):
            self._daemon(number, "slurmd", "-D", "-N", node)
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%T %D", cwd=folder)[1].strip() == f"idle {len(self.nodes)}")

    def _daemon(self, host: int, *command: str) -> None:
        self._start(host, command, cwd=self._folder, log=self._folder / "daemons.log")

    def _start(self, host: int, command: Sequence[str], *, cwd: Path, log: Path) -> subprocess.Popen[str]:
        name = ["login", *self.nodes][host]
        words = [*ENTER, NAMED, "sh", str(self._folder / "hosts"), name]
        words += ["env", f"SLURM_CONF={self._folder}/slurm.conf", *command]
        return self._hosts.start(host, words, cwd=cwd, log=log)

    def _wait(self, condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"SLURM does not start:\n{self.logs()}")
            time.sleep(0.1)


@contextmanager
def slurm(nodes: int = 2) -> Iterator[Slurm]:
    """Give a SLURM of so many nodes, and take it away with all that runs in it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, hosts(nodes + 1) as made:
        cluster = Slurm(Path(folder), made)
        cluster._begin()
        yield cluster


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with slurm() as cluster:
        code, said = cluster.run(*sys.argv[1:], cwd=Path.cwd(), timeout_s=600.0)
        print(said, end="")
    sys.exit(code)
