"""Several hosts on this machine: network namespaces on one bridge, each with an address of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def why_not() -> str:
    """Return why no hosts can be made here, an empty string if they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "hosts are network namespaces, which need Linux and iproute2"
    name = f"pf{os.getpid()}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"this process may not make network namespaces ({made.stderr.strip()})"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


class Hosts:
    """Hosts 0, 1, … with the addresses 10.77.0.1, 10.77.0.2, …"""

    def __init__(self, number: int) -> None:
        self.number = number
        self._prefix = f"pf{os.getpid()}"
        self._switch = f"{self._prefix}s"
        self._started: list[subprocess.Popen[str]] = []

    def address(self, host: int) -> str:
        """Return a host's address."""
        return f"10.77.0.{host + 1}"

    def start(self, host: int, command: Sequence[str], *, cwd: Path, log: Path) -> subprocess.Popen[str]:
        """Start a command on a host; its output goes to a file."""
        with log.open("a") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._name(host), *command],
                cwd=cwd,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                text=True,
            )
        self._started.append(process)
        return process

    def cut(self, host: int) -> None:
        """Pull the plug of a host: nothing it sends arrives, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put the plug back."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def slow(self, host: int) -> bool:
        """Let a host send 2 Mbit/s; return False if the system cannot."""
        command = ["tc", "-n", self._name(host), "qdisc", "replace", "dev", "eth0", "root", "tbf"]
        limit = ["rate", "2mbit", "burst", "32kbit", "latency", "400ms"]
        return subprocess.run([*command, *limit], capture_output=True, check=False).returncode == 0

    def listening(self, host: int) -> list[str]:
        """Return the addresses on which anything listens on a host, from ``/proc/net/tcp`` and ``tcp6``."""
        found = []
        for table in ("tcp", "tcp6"):
            rows = _run("ip", "netns", "exec", self._name(host), "cat", f"/proc/net/{table}").splitlines()[1:]
            found += [row.split()[1] for row in rows if row.split()[3] == "0A"]
        return found

    def _name(self, host: int) -> str:
        return f"{self._prefix}h{host}"

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")
        for host in range(self.number):
            name = self._name(host)
            _ip("netns", "add", name)
            end = ("type", "veth", "peer", "name", f"port{host}", "netns", self._switch)
            _ip("-n", name, "link", "add", "eth0", *end)
            _ip("-n", self._switch, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(30)
        for name in (*map(self._name, range(self.number)), self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def hosts(number: int) -> Iterator[Hosts]:
    """Give so many hosts, and take them away with all that runs on them."""
    made = Hosts(number)
    try:
        made._make()
        yield made
    finally:
        made._end()


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout
