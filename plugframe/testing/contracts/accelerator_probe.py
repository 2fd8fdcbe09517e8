"""Query an accelerator in a fresh process, and use its device in a fork of that process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

#: Prints the answers as JSON. Its arguments: the accelerator's name, its options and `sys.path`.
_ASK = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[3])
from plugframe.core.registry.registry import Registry
registry = Registry.discover()
plugin = registry.make(registry.find("accelerator", sys.argv[1]), json.loads(sys.argv[2]))
answers = {"available": False, "type": "bool", "fork": ""}
try:
    available = plugin.accelerator_is_available()
    answers |= {"available": bool(available), "type": type(available).__name__}
except Exception as error:
    answers["raised"] = f"{type(error).__name__}: {error}"
if answers["available"]:
    import torch
    answers["count"] = plugin.accelerator_device_count()
    answers["devices"] = plugin.accelerator_parse_devices(devices=1)
    device = plugin.accelerator_device(index=answers["devices"][0])
    sys.stdout.flush()
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            torch.ones(2, device=device).sum().item()
            answer = ""
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}".splitlines()[0]
        os.write(there, answer.encode())
        os._exit(0)
    os.close(there)
    answers["fork"] = os.read(here, 1000).decode()
    os.waitpid(pid, 0)
print(json.dumps(answers))
"""


def answers(spec: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an accelerator answers in a process that has done nothing else.

    Keys: ``available``, ``type`` (of the answer), ``raised`` (an error, if any), ``fork`` (the error of a forked
    process that used the device, ``""`` without one), and where a device is available ``count`` and ``devices``.

    Raises:
        RuntimeError: The process failed; the message is the last line that it wrote to stderr.
    """
    arguments = [spec, json.dumps(dict(options)), json.dumps(sys.path)]
    command = [sys.executable, "-W", "ignore", "-c", _ASK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
